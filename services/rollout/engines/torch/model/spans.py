"""Rows of a forward pass at consecutive positions of KV slots.

Dims: N rows, C spans of them, Q rows of the longest span, T positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from miles.services.rollout.engines.torch.model.attention import PrefillRows


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Rows to compute at positions `start` to `end` - 1 of a KV slot."""

    slot: int
    start: int
    end: int

    @property
    def rows(self) -> int:
        """How many."""
        return self.end - self.start


def prefill_rows(
    spans: Sequence[Span], length: int, dtype: torch.dtype, device: torch.device, *, first: int = 0, queries: int = 1
) -> PrefillRows:
    """Say what each row of spans, one span behind the other, may look at: its own position and those before.

    Args:
        spans: What is computed; there is at least one.
        length: Positions that attention spans.
        dtype: Of the attention mask.
        device: Of everything.
        first: Rows of the forward pass that come before them.
        queries: Rows that each span is padded to at least.
    """

    def tensor(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)

    lengths_C, starts_C = tensor([span.rows for span in spans]), tensor([span.start for span in spans])
    first_C = lengths_C.cumsum(0) - lengths_C
    query_Q = torch.arange(max(queries, *(span.rows for span in spans)), device=device)
    query_CQ = query_Q.minimum(lengths_C[:, None] - 1)
    chunk_N = torch.repeat_interleave(torch.arange(len(spans), device=device), lengths_C)
    hidden_CQT = torch.arange(length, device=device) > (starts_C[:, None] + query_CQ)[..., None]
    mask_CQT = torch.zeros(hidden_CQT.shape, dtype=dtype, device=device).masked_fill_(hidden_CQT, -torch.inf)
    return PrefillRows(
        packed_CQ=first + first_C[:, None] + query_CQ,
        chunk_N=chunk_N,
        query_N=torch.arange(len(chunk_N), device=device) - first_C[chunk_N],
        slots_C=tensor([span.slot for span in spans]),
        length=length,
        mask_C11QT=mask_CQT[:, None, None],
    )
