"""Attention whose queries are the last rows of the keys, without a mask of all of them.

A mask of long sequences is large: at 32k rows a gigabyte, four more where the kernel turns it into numbers, and each
layer keeps one for the backward pass. So queries are taken in blocks, each with the keys that it sees and a mask of its
own, which is made again in the backward pass together with the block's output.

Dims: L queries, M keys, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From query [1, H, L, D], key and value [1, K, M, D] and bool [L, M], which keys a query sees, to [1, H, L, D]."""

MAX_SCORES = 2**22
"""Scores per head up to which one mask is made: 20 MB with the kernel's numbers."""
MIN_BLOCK = 64
"""Fewest queries of a block."""


def attend_last_rows(
    attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, back: int | None = None
) -> torch.Tensor:
    """Causal attention of the last L of M rows, each of which sees itself and `back` rows before it (None: all)."""
    rows, keys = query.shape[2], key.shape[2]
    if rows * keys <= MAX_SCORES:
        return attend(query, key, value, _seen(rows, keys, back, query.device))
    size = max(MIN_BLOCK, MAX_SCORES // keys)
    before = keys - rows
    outs = []
    for start in reversed(range(0, rows, size)):  # the largest mask first: each later one fits into its memory
        end = min(start + size, rows)
        first = 0 if back is None else max(0, before + start - back)
        part = query[:, :, start:end], key[:, :, first : before + end], value[:, :, first : before + end]
        outs.append(checkpoint(_attend_block, attend, *part, back, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(outs[::-1], dim=2)


def _attend_block(
    attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, back: int | None
) -> torch.Tensor:
    return attend(query, key, value, _seen(query.shape[2], key.shape[2], back, query.device))


def _seen(rows: int, keys: int, back: int | None, device: torch.device) -> torch.Tensor:
    """bool [rows, keys]; the last row sees every key up to itself."""
    seen = torch.ones(rows, keys, dtype=torch.bool, device=device).tril(keys - rows)
    return seen if back is None else seen.triu(keys - rows - back)
