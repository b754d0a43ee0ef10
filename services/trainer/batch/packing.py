"""Samples to micro-batches: which rows a micro-batch has and what each row may attend to.

A micro-batch is one packed sequence of T rows. Each sample gives its tokens but the last, which predicts nothing. With
shared prompts, rows that samples of one group have in common from the beginning are there once: the prompt, and as much
of the responses as is equal. A sample is then the rows of others up to where it parts from them, and a segment of its
own behind them. Positions go on from there, so every row computes what it would compute in a sequence of its own; only
the order of floating-point sums differs. Rows that the engine routed through different experts are not equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from miles.services.trainer.batch.prefixes import longest_prefix
from miles.types import Sample


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, end) attend causally to themselves, and to all rows of their prefix."""

    start: int
    end: int
    prefix: tuple[tuple[int, int], ...] = ()
    """Ranges of earlier rows, oldest first."""

    @property
    def rows(self) -> int:
        return self.end - self.start

    @property
    def prefix_rows(self) -> int:
        return sum(end - start for start, end in self.prefix)

    @property
    def seen(self) -> tuple[tuple[int, int], ...]:
        """Ranges of what the last row sees, oldest first: the prefix and the segment itself."""
        return (*self.prefix, (self.start, self.end))

    def seen_rows(self) -> npt.NDArray[np.int64]:
        """The rows of `seen`."""
        return seen_rows((self,))


def seen_rows(segments: Sequence[Segment]) -> npt.NDArray[np.int64]:
    """What the last row of each segment sees, segment after segment."""
    bounds = np.array([piece for segment in segments for piece in segment.seen], np.int64)
    starts, lengths = bounds[:, 0], bounds[:, 1] - bounds[:, 0]
    shifts = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return shifts + np.arange(len(shifts))


@dataclasses.dataclass(frozen=True, slots=True)
class MicroBatch:
    """Packed rows, and where the predictions of response tokens are. T rows, S samples, R response tokens in all."""

    input_ids_T: npt.NDArray[np.int64]
    position_ids_T: npt.NDArray[np.int64]
    segments: tuple[Segment, ...]
    """In row order, without gaps."""
    samples: tuple[int, ...]
    """Index of each sample in the list that was packed; S of them."""
    logit_rows_R: npt.NDArray[np.int64]
    """Row whose logits predict each response token, sample after sample."""
    targets_R: npt.NDArray[np.int64]
    """The response tokens themselves."""
    cu_responses: tuple[int, ...]
    """Where each sample's response tokens start in R, and R at the end; S + 1 numbers."""
    row_sources_T: npt.NDArray[np.int64]
    """(T, 2): index of the sample that gave the row, and the token's position in that sample."""

    @property
    def num_rows(self) -> int:
        return len(self.input_ids_T)

    @property
    def is_empty(self) -> bool:
        """True for the padding that evens out the number of micro-batches over ranks."""
        return not self.samples


def pack(samples: Sequence[Sample], indices: Sequence[int], *, share_prompts: bool) -> MicroBatch:
    """Pack `samples[i] for i in indices` into one micro-batch.

    Samples of a group must be neighbours in `indices` to share rows. Raises ValueError for a sample without a prompt
    or without a response.
    """
    rows = _Rows()
    group: list[Sample] = []
    group_rows: list[npt.NDArray[np.int64]] = []
    for index in indices:
        sample = samples[index]
        if sample.prompt_length < 1 or sample.response_length < 1:
            raise ValueError(
                f"sample {sample.index} of group {sample.group_id} has {sample.prompt_length} prompt and "
                f"{sample.response_length} response tokens; both must be at least 1"
            )
        if not share_prompts or (group and group[0].group_id != sample.group_id):
            group, group_rows = [], []
        owner, common = longest_prefix(sample, group)
        group.append(sample)
        group_rows.append(rows.append(sample, index, group_rows[owner][:common] if common else _NO_ROWS))
    return rows.build()


def row_count(samples: Sequence[Sample], indices: Sequence[int], *, share_prompts: bool) -> int:
    """Rows that `pack` would make of these samples, without packing them."""
    counter = RowCounter(share_prompts=share_prompts)
    for index in indices:
        counter.add(samples[index], counter.added_by(samples[index]))
    return counter.rows


class RowCounter:
    """Rows of a micro-batch to which samples are added one by one."""

    def __init__(self, *, share_prompts: bool) -> None:
        self.rows = 0
        self._share = share_prompts
        self._group: list[Sample] = []

    def added_by(self, sample: Sample) -> int:
        """Rows that the sample would add."""
        same_group = self._share and self._group and self._group[0].group_id == sample.group_id
        return len(sample.tokens) - 1 - (longest_prefix(sample, self._group)[1] if same_group else 0)

    def add(self, sample: Sample, added: int) -> None:
        """Count the sample in, which adds what `added_by` has said."""
        self.rows += added
        if self._group and self._group[0].group_id != sample.group_id:
            self._group = []
        self._group.append(sample)


_NO_ROWS = np.zeros(0, np.int64)

EMPTY = MicroBatch(
    input_ids_T=np.zeros(2, np.int64),
    position_ids_T=np.arange(2, dtype=np.int64),
    segments=(Segment(0, 2),),
    samples=(),
    logit_rows_R=np.zeros(0, np.int64),
    targets_R=np.zeros(0, np.int64),
    cu_responses=(0,),
    row_sources_T=np.zeros((2, 2), np.int64),
)
"""No samples, but two rows of nothing: a rank without work must still take part in every layer's collectives. One row
would be a case of its own to compilers."""


class _Rows:
    """A micro-batch under construction. What many samples have is made of all at once: there are hundreds of them."""

    def __init__(self) -> None:
        self.count = 0
        self._ids: list[npt.NDArray[np.integer]] = []
        self._segments: list[Segment] = []
        self._sources: list[tuple[int, int]] = []
        """Of each segment the sample that gave it, and the first row's position in that."""
        self._samples: list[int] = []
        self._logit_rows: list[npt.NDArray[np.int64]] = []
        self._targets: list[npt.NDArray[np.integer]] = []

    def append(self, sample: Sample, index: int, shared: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Add a sample whose first rows are there already; returns the rows of all its tokens but the last."""
        first, last = len(shared), len(sample.tokens) - 1
        rows = np.arange(self.count, self.count + last - first, dtype=np.int64)
        if len(rows):
            self._ids.append(sample.tokens[first:last])
            self._sources.append((index, first))
            self._segments.append(Segment(self.count, self.count + len(rows), _ranges(shared)))
            self.count += len(rows)
        if first:
            rows = np.concatenate([shared, rows])
        self._samples.append(index)
        self._logit_rows.append(rows[sample.prompt_length - 1 :])
        self._targets.append(sample.response_tokens)
        return rows

    def build(self) -> MicroBatch:
        if not self._samples:
            return EMPTY
        lengths = [len(targets) for targets in self._targets]
        rows = np.array([segment.rows for segment in self._segments])
        sources = np.repeat(np.array(self._sources, np.int64), rows, axis=0)
        sources[:, 1] += np.arange(self.count) - np.repeat(np.cumsum(rows) - rows, rows)
        return MicroBatch(
            input_ids_T=np.concatenate(self._ids).astype(np.int64),
            position_ids_T=sources[:, 1].copy(),
            segments=tuple(self._segments),
            samples=tuple(self._samples),
            logit_rows_R=np.concatenate(self._logit_rows),
            targets_R=np.concatenate(self._targets).astype(np.int64),
            cu_responses=(0, *np.cumsum(lengths).tolist()),
            row_sources_T=sources,
        )


def _ranges(rows: npt.NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    """Ascending rows as ranges without gaps."""
    if not len(rows):
        return ()
    first, end = int(rows[0]), int(rows[-1]) + 1
    if end - first == len(rows):
        return ((first, end),)
    pieces = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
    return tuple((int(piece[0]), int(piece[-1]) + 1) for piece in pieces)
