"""How steps are padded so that rows do not depend on one another."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from miles.services.rollout.engines.torch.model.architecture import ModelShape
from miles.services.rollout.engines.torch.model.invariance import (
    MIN_ROWS,
    RowPadding,
    choose_padding,
    dependent_shapes,
    min_query_rows,
)

SHAPE = ModelShape(
    layers=2,
    heads=6,
    kv_heads=2,
    head_dim=16,
    hidden_size=96,
    intermediate_size=128,
    vocabulary=320,
    max_positions=512,
)
CPU = torch.device("cpu")
LIMITS = {"max_running_requests": 20, "max_prefill_tokens": 1000}


def one_by_one(rows_MI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """Each row by itself."""
    return torch.cat([row[None] @ weight_OI.T for row in rows_MI])


def split_when_many(rows_MI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """Adds up in two halves from 64 rows on, as a library that changes its kernel would."""
    if rows_MI.shape[0] < 64:
        return one_by_one(rows_MI, weight_OI)
    half = rows_MI.shape[1] // 2
    return one_by_one(rows_MI[:, :half], weight_OI[:, :half]) + one_by_one(rows_MI[:, half:], weight_OI[:, half:])


def last_row_differs(rows_MI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """Treats the last row unlike the others."""
    return torch.cat(
        [one_by_one(rows_MI[:-1], weight_OI), one_by_one(rows_MI[-1:].double(), weight_OI.double()).float()]
    )


def test_independent_rows_are_padded_to_sixteen_at_least() -> None:
    assert dependent_shapes(SHAPE, torch.float32, CPU, (16, 64), one_by_one) == []
    padding = choose_padding(SHAPE, torch.float32, CPU, **LIMITS, linear=one_by_one)
    assert padding.tokens == padding.logits == RowPadding(MIN_ROWS, exact=False)
    assert padding.max_prefill_tokens == 1000


def test_routers_have_no_numbers_left_over_from_vectors() -> None:
    for experts, multiple in ((8, 4), (6, 16), (64, 1)):
        padding = choose_padding(
            dataclasses.replace(SHAPE, experts=experts), torch.float32, CPU, **LIMITS, linear=one_by_one
        )
        assert padding.tokens == RowPadding(multiple=multiple)
        for count in (1, 16, 17, 21):
            assert (count + padding.tokens.missing(count)) * experts % 32 == 0


def test_drafts_take_no_rows_from_prompts() -> None:
    padding = choose_padding(SHAPE, torch.float32, CPU, **LIMITS, max_drafts=4, linear=one_by_one)
    assert (padding.max_draft_tokens, padding.max_prefill_tokens) == (80, 1000)
    padding = choose_padding(SHAPE, torch.float32, CPU, **LIMITS, max_drafts=4, linear=split_when_many)
    assert (padding.max_draft_tokens, padding.max_prefill_tokens) == (64, 64)
    assert padding.tokens.missing(20 + 64 + 64) >= 0
    assert padding.logits.missing(20 + 64) >= 0


def test_a_kernel_that_changes_with_the_number_of_rows_gets_one_number(caplog: pytest.LogCaptureFixture) -> None:
    assert "96 x 128" in dependent_shapes(SHAPE, torch.float32, CPU, (16, 64), split_when_many)
    with caplog.at_level(logging.WARNING):
        padding = choose_padding(SHAPE, torch.float32, CPU, **LIMITS, linear=split_when_many)
    assert padding.tokens == RowPadding(96, exact=True)
    assert padding.logits == RowPadding(32, exact=True)
    assert padding.max_prefill_tokens == 64
    assert "computes a row differently" not in caplog.text


def test_a_place_among_the_rows_that_matters_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        choose_padding(SHAPE, torch.float32, CPU, **LIMITS, linear=last_row_differs)
    assert "computes a row differently beside different rows (96 x 32" in caplog.text


def test_the_query_padding_is_one_that_the_engine_knows() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert min_query_rows(SHAPE, dtype, CPU) in (None, 1, 4, 8, 16)


def test_missing_rows_are_counted_up_to_the_padding() -> None:
    assert RowPadding(16).missing(3) == 13
    assert RowPadding(16).missing(30) == 0
    assert RowPadding(16, exact=True).missing(16) == 0
    with pytest.raises(ValueError, match="17 rows in a step that is padded to exactly 16"):
        RowPadding(16, exact=True).missing(17)
