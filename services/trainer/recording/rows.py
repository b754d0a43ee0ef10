"""Where recorded samples are in a micro-batch.

Dims: T rows and R response tokens of the micro-batch, N rows of recorded samples (a shared one once for each of them),
M response tokens of recorded samples.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from miles.services.trainer.batch.packing import MicroBatch, Segment


@dataclasses.dataclass(frozen=True, slots=True)
class RecordedRows:
    """The rows of samples that are recorded, and what they are of them."""

    row_N: npt.NDArray[np.int64]
    """Row of the micro-batch."""
    rows_N2: npt.NDArray[np.int32]
    """Number of the sample among the recorded ones, and position of the token in it."""
    response_M: npt.NDArray[np.int64]
    """Index in R."""
    top_rows_M2: npt.NDArray[np.int32]
    """Number of the sample, and number of the response token in it."""


def recorded_rows(micro_batch: MicroBatch, numbers: Mapping[int, int]) -> RecordedRows | None:
    """Find the samples that are recorded, by their index in what was packed; None when there are none.

    `numbers` gives each one's number among the recorded ones.
    """
    places = [place for place, sample in enumerate(micro_batch.samples) if sample in numbers]
    if not places:
        return None
    starts = [segment.start for segment in micro_batch.segments]
    rows, responses = [], []
    for place in places:
        first, end = micro_batch.cu_responses[place : place + 2]
        last = int(micro_batch.logit_rows_R[end - 1])
        rows.append(_seen_by(last, micro_batch.segments[bisect.bisect_right(starts, last) - 1]))
        responses.append(np.arange(first, end))
    own = [numbers[micro_batch.samples[place]] for place in places]
    return RecordedRows(
        row_N=np.concatenate(rows),
        rows_N2=_numbered(own, [len(each) for each in rows]),
        response_M=np.concatenate(responses),
        top_rows_M2=_numbered(own, [len(each) for each in responses]),
    )


def _seen_by(row: int, segment: Segment) -> npt.NDArray[np.int64]:
    """The rows of a sample whose last one is given: all that it attends to."""
    return dataclasses.replace(segment, end=row + 1).seen_rows()


def _numbered(numbers: list[int], lengths: list[int]) -> npt.NDArray[np.int32]:
    """Pairs of a number, repeated, and a count from 0."""
    counts = np.concatenate([np.arange(length) for length in lengths])
    return np.stack([np.repeat(numbers, lengths), counts], axis=1).astype(np.int32)
