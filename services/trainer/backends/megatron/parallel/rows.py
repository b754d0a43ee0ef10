"""A micro-batch's rows as one rank of a layout computes them: padded to what the layout divides, and cut.

Context-parallel ranks hold two chunks of every sequence, one from its front and the matching one from its back, so that
causal attention is the same work for all (the order that Megatron-Core and TransformerEngine expect).
Padded micro-batches (qkv_format bshd) have one column for each sample instead, as long as the longest.
Dims: T rows of the micro-batch, L rows of this context-parallel rank, R response tokens, S sequences, M rows of the
longest one.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import numpy.typing as npt

from miles.services.trainer.batch.packing import MicroBatch

PADDING = -1


@dataclasses.dataclass(frozen=True, slots=True)
class LocalRows:
    """What one context-parallel rank computes."""

    sources_L: npt.NDArray[np.int64]
    """Row of the micro-batch, or `PADDING`."""
    input_ids_L: npt.NDArray[np.int64]
    position_ids_L: npt.NDArray[np.int64]
    cu_seqlens: npt.NDArray[np.int32]
    """Where sequences begin among the padded rows of all context-parallel ranks; S + 1 numbers."""
    max_seqlen: int
    logit_rows: npt.NDArray[np.int64]
    """Rows of L whose logits predict response tokens."""
    responses: npt.NDArray[np.int64]
    """Which response token of R each of them predicts."""
    columns: int | None = None
    """S where samples lie side by side, the first row of each before the second: L = M · S; None for packed ones."""

    def by_sample(self, values_L: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """[1, L], or [S, M] where samples lie side by side."""
        return np.ascontiguousarray(values_L.reshape(-1, self.columns or 1).T)


def local_rows(micro_batch: MicroBatch, *, context_rank: int, context_size: int, multiple_of: int) -> LocalRows:
    """Cut a micro-batch whose samples do not share prompts. L is a multiple of `multiple_of`."""
    unit = 2 * context_size if context_size > 1 else 1
    total_multiple = unit * multiple_of
    pieces = [_padded(np.arange(s.start, s.end), unit) for s in micro_batch.segments]
    rows = sum(len(piece) for piece in pieces)
    if rows % total_multiple:
        pieces.append(np.full(total_multiple - rows % total_multiple, PADDING, np.int64))
    sources = np.concatenate([_zigzag(piece, context_rank, context_size) for piece in pieces])
    return _rows(micro_batch, sources, [len(piece) for piece in pieces])


def padded_rows(micro_batch: MicroBatch, *, multiple_of: int) -> LocalRows:
    """Lay samples that do not share prompts side by side. M is a multiple of `multiple_of`."""
    longest = max(segment.rows for segment in micro_batch.segments)
    longest += -longest % multiple_of
    columns = [_padded(np.arange(s.start, s.end), longest) for s in micro_batch.segments]
    sources = np.stack(columns, axis=1).reshape(-1)
    return dataclasses.replace(_rows(micro_batch, sources, [longest] * len(columns)), columns=len(columns))


def part_of_rows(values_L: npt.NDArray[np.int64], part: int, parts: int) -> npt.NDArray[np.int64]:
    """What one of the tensor-parallel ranks has of them that share rows by sequence parallelism."""
    size = len(values_L) // parts
    return values_L[part * size : (part + 1) * size]


def _rows(micro_batch: MicroBatch, sources: npt.NDArray[np.int64], lengths: list[int]) -> LocalRows:
    present = sources != PADDING
    response_of_row = np.full(micro_batch.num_rows, PADDING, np.int64)
    response_of_row[micro_batch.logit_rows_R] = np.arange(len(micro_batch.logit_rows_R))
    response = np.where(present, response_of_row[sources], PADDING)
    logit_rows = np.flatnonzero(response != PADDING)
    logit_rows = logit_rows[np.argsort(response[logit_rows])]  # outputs are in the order of responses
    return LocalRows(
        sources_L=sources,
        input_ids_L=np.where(present, micro_batch.input_ids_T[sources], 0),
        position_ids_L=np.where(present, micro_batch.position_ids_T[sources], 0),
        cu_seqlens=np.array([0, *itertools.accumulate(lengths)], np.int32),
        max_seqlen=max(lengths),
        logit_rows=logit_rows,
        responses=response[logit_rows],
    )


def _padded(rows: npt.NDArray[np.int64], unit: int) -> npt.NDArray[np.int64]:
    return np.pad(rows, (0, -len(rows) % unit), constant_values=PADDING)


def _zigzag(rows: npt.NDArray[np.int64], rank: int, size: int) -> npt.NDArray[np.int64]:
    """Chunks `rank` and `2 size - 1 - rank` of 2 `size` equal ones."""
    if size == 1:
        return rows
    chunks = rows.reshape(2 * size, -1)
    return np.concatenate([chunks[rank], chunks[2 * size - 1 - rank]])
