"""The start-up check of this machine's arithmetic."""

from __future__ import annotations

import torch

from miles.services.rollout.engines.torch.invariance import dependent_shapes, min_query_rows
from miles.services.rollout.engines.torch.model import ModelShape

SHAPE = ModelShape(layers=2, heads=6, kv_heads=2, head_dim=16, hidden_size=96, vocabulary=320, max_positions=512)
CPU = torch.device("cpu")


def test_a_matmul_that_rounds_by_the_number_of_rows_is_found() -> None:
    def split(rows_MI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
        """Adds up in two halves from 64 rows on, as a library that changes its kernel would."""
        if rows_MI.shape[0] < 64:
            return rows_MI @ weight_OI.T
        half = rows_MI.shape[1] // 2
        return rows_MI[:, :half] @ weight_OI[:, :half].T + rows_MI[:, half:] @ weight_OI[:, half:].T

    assert "96 x 384" in dependent_shapes(SHAPE, torch.float32, CPU, split)


def test_rows_computed_one_by_one_are_independent() -> None:
    def one_by_one(rows_MI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
        return torch.cat([row[None] @ weight_OI.T for row in rows_MI])

    assert dependent_shapes(SHAPE, torch.float32, CPU, one_by_one) == []


def test_the_query_padding_is_one_that_the_engine_knows() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert min_query_rows(SHAPE, dtype, CPU) in (None, 1, 4, 8, 16)
