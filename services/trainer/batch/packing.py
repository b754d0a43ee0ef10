"""Samples to micro-batches: which rows a micro-batch has and what each row may attend to.

A micro-batch is one packed sequence of T rows. Each sample gives its tokens but the last, which predicts nothing. With
shared prompts, samples of one group whose prompts are equal hold the prompt's rows once: a prompt segment, then one
segment per response that attends to the prompt and to itself. Positions go on from the prompt, so every row computes
what it would compute in a sequence of its own; only the order of floating-point sums differs. Prompts that the engine
routed through different experts are not equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from miles.types import Sample


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, end) attend causally to themselves, and to all of [prefix_start, prefix_end) when that is not empty.

    A prefix is a segment of its own, earlier in the micro-batch and without a prefix.
    """

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0


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

    Samples that share a prompt must be neighbours in `indices` to hold it once. Raises ValueError for a sample without
    a prompt or without a response.
    """
    rows = _Rows()
    prompt_owner: int | None = None
    prompt_segment = Segment(0, 0)
    for index in indices:
        sample = samples[index]
        if sample.prompt_length < 1 or sample.response_length < 1:
            raise ValueError(
                f"sample {sample.index} of group {sample.group_id} has {sample.prompt_length} prompt and "
                f"{sample.response_length} response tokens; both must be at least 1"
            )
        if not share_prompts:
            segment = rows.append_segment(sample, index, 0, len(sample.tokens) - 1)
            rows.append_response(sample, index, segment.start + sample.prompt_length - 1, segment.end)
            continue
        if prompt_owner is None or not _same_prompt(samples[prompt_owner], sample):
            prompt_owner = index
            prompt_segment = rows.append_segment(sample, index, 0, sample.prompt_length)
        start = rows.count
        if sample.response_length > 1:
            rows.append_segment(sample, index, sample.prompt_length, len(sample.tokens) - 1, prompt_segment)
        rows.append_response(sample, index, prompt_segment.end - 1, rows.count, start)
    return rows.build()


def row_count(samples: Sequence[Sample], indices: Sequence[int], *, share_prompts: bool) -> int:
    """Rows that `pack` would make of these samples, without packing them."""
    total = 0
    owner: int | None = None
    for index in indices:
        sample = samples[index]
        total += sample.response_length - 1
        if not share_prompts or owner is None or not _same_prompt(samples[owner], sample):
            owner = index
            total += sample.prompt_length
    return total


EMPTY = MicroBatch(
    input_ids_T=np.zeros(1, np.int64),
    position_ids_T=np.zeros(1, np.int64),
    segments=(Segment(0, 1),),
    samples=(),
    logit_rows_R=np.zeros(0, np.int64),
    targets_R=np.zeros(0, np.int64),
    cu_responses=(0,),
    row_sources_T=np.zeros((1, 2), np.int64),
)
"""No samples, but one row of nothing: a rank without work must still take part in every layer's collectives."""


class _Rows:
    """A micro-batch under construction."""

    def __init__(self) -> None:
        self.count = 0
        self._ids: list[npt.NDArray[np.int64]] = []
        self._positions: list[npt.NDArray[np.int64]] = []
        self._sources: list[npt.NDArray[np.int64]] = []
        self._segments: list[Segment] = []
        self._samples: list[int] = []
        self._logit_rows: list[npt.NDArray[np.int64]] = []
        self._targets: list[npt.NDArray[np.int64]] = []

    def append_segment(
        self, sample: Sample, index: int, first: int, last: int, prefix: Segment = Segment(0, 0)
    ) -> Segment:
        """Add tokens [first, last) of the sample as a segment."""
        positions = np.arange(first, last, dtype=np.int64)
        self._ids.append(sample.tokens[first:last].astype(np.int64))
        self._positions.append(positions)
        self._sources.append(np.stack([np.full(last - first, index, np.int64), positions], axis=1))
        segment = Segment(self.count, self.count + last - first, prefix.start, prefix.end)
        self._segments.append(segment)
        self.count = segment.end
        return segment

    def append_response(
        self, sample: Sample, index: int, first_row: int, end_row: int, rest: int | None = None
    ) -> None:
        """Note the rows that predict the response: `first_row`, then [rest, end_row), by default those that follow."""
        rest = first_row + 1 if rest is None else rest
        self._samples.append(index)
        self._logit_rows.append(np.concatenate([[first_row], np.arange(rest, end_row)]).astype(np.int64))
        self._targets.append(sample.response_tokens.astype(np.int64))

    def build(self) -> MicroBatch:
        if not self._samples:
            return EMPTY
        lengths = [len(targets) for targets in self._targets]
        return MicroBatch(
            input_ids_T=np.concatenate(self._ids),
            position_ids_T=np.concatenate(self._positions),
            segments=tuple(self._segments),
            samples=tuple(self._samples),
            logit_rows_R=np.concatenate(self._logit_rows),
            targets_R=np.concatenate(self._targets),
            cu_responses=(0, *np.cumsum(lengths).tolist()),
            row_sources_T=np.concatenate(self._sources),
        )


def _same_prompt(left: Sample, right: Sample) -> bool:
    """Whether the samples can hold their prompt once: one group, equal tokens, and equal routing where recorded."""
    if left.group_id != right.group_id or not np.array_equal(left.prompt_tokens, right.prompt_tokens):
        return False
    routed, other = left.rollout_routed_experts, right.rollout_routed_experts
    if routed is None or other is None:
        return routed is other
    return np.array_equal(routed[: left.prompt_length], other[: right.prompt_length])
