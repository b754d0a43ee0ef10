"""Attention in blocks of queries gives what one mask over all of them would."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from miles.services.trainer.backends.masked_attention import MAX_SCORES, attend_last_rows


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


@pytest.mark.parametrize(("rows", "keys"), [(1500, 3000), (2100, 2100), (70, 61_000), (8, 40)])
@pytest.mark.parametrize("back", [None, 0, 100])
def test_blocks_give_what_one_mask_gives(rows: int, keys: int, back: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, rows, 4, generator=generator, requires_grad=True)
    k, v = (torch.randn(1, 1, keys, 4, generator=generator, requires_grad=True) for _ in range(2))
    upstream = torch.randn(1, 2, rows, 4, generator=generator)
    distance = torch.arange(keys - rows, keys)[:, None] - torch.arange(keys)[None]
    seen = (distance >= 0) & (distance <= (keys if back is None else back))
    results = []
    for out in (attend_last_rows(attend, q, k, v, back), attend(q, k, v, seen)):
        results.append((out, *torch.autograd.grad(out, (q, k, v), upstream)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_no_block_has_a_larger_mask_than_is_said() -> None:
    asked: list[int] = []

    def count(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        asked.append(seen.numel())
        return q

    q, k = torch.zeros(1, 1, 3000, 1), torch.zeros(1, 1, 9000, 1)
    assert attend_last_rows(count, q, k, k).shape == q.shape
    assert attend_last_rows(count, q, k, k, back=10).shape == q.shape
    assert len(asked) > 2
    assert max(asked) <= MAX_SCORES
