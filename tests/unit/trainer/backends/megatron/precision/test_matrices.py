from __future__ import annotations

import pytest
import torch

from miles.precision.fp8_block import Fp8Block
from miles.services.trainer.backends.megatron.precision.matrices import GateAndUp, Matrices, QueryGroups, Whole
from miles.services.trainer.backends.megatron.precision.rounding import ParameterRounding, rounded_once

HEAD, COLUMNS = 40, 200
FORMAT = Fp8Block()


def matrix(rows: int, seed: int) -> torch.Tensor:
    """Rows of very different sizes, so that it shows which share a block."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, COLUMNS, generator=generator) * torch.logspace(-2, 2, rows)[:, None]


def test_queries_keys_and_values_are_rounded_each_by_itself() -> None:
    """3 query groups of 2 heads; no size is a multiple of a block's."""
    query, key, value = (matrix(rows * HEAD, rows) for rows in (6, 3, 3))
    by_group = [each.view(3, -1, COLUMNS) for each in (query, key, value)]
    fused = torch.cat(by_group, dim=1).reshape(-1, COLUMNS)
    layout = QueryGroups(("q", "k", "v"), heads=2, head_size=HEAD)
    rounded = layout.rounded(fused, (True, False, True), FORMAT.rounded).view(3, -1, COLUMNS)
    expected = (FORMAT.rounded(query), key, FORMAT.rounded(value))
    for part, wanted in zip(rounded.split([2 * HEAD, HEAD, HEAD], dim=1), expected, strict=True):
        assert part.reshape(-1, COLUMNS).equal(wanted)
    assert layout.rows(len(fused)) == (len(query), len(key), len(value))
    assert layout.runs(len(fused)) == (2 * HEAD, HEAD, HEAD) * 3


@pytest.mark.parametrize("covered", [(True, True), (True, False), (False, True)])
def test_gates_and_ups_are_rounded_each_by_itself(covered: tuple[bool, bool]) -> None:
    halves = [matrix(100, seed) for seed in (1, 2)]
    rounded = GateAndUp(("gate", "up")).rounded(torch.cat(halves), covered, FORMAT.rounded)
    for part, half, chosen in zip(rounded.split(100), halves, covered, strict=True):
        assert part.equal(FORMAT.rounded(half) if chosen else half)


LAYOUTS: list[tuple[Matrices, int]] = [
    (Whole(("o",)), 1),
    (GateAndUp(("gate", "up")), 2),
    (QueryGroups(("q", "k", "v"), heads=2, head_size=HEAD), 3),
]


@pytest.mark.parametrize(("layout", "count"), LAYOUTS)
def test_gradients_go_straight_through(layout: Matrices, count: int) -> None:
    weight = matrix(4 * HEAD, 0).requires_grad_()
    before = weight.detach().clone()
    rounded = ParameterRounding(FORMAT, layout, (True,) * count).weight(weight)
    gradient = torch.randn_like(rounded)
    rounded.backward(gradient)
    assert weight.grad is not None
    assert weight.grad.equal(gradient)
    assert weight.equal(before)
    assert not rounded.equal(before)


def test_a_weight_is_rounded_once_in_a_block_and_anew_after_it() -> None:
    module = torch.nn.Linear(COLUMNS, HEAD)
    rounding = ParameterRounding(FORMAT, Whole(("o",)), (True,))
    module.roundings = {"weight": rounding}  # type: ignore[assignment]
    with rounded_once([module]):
        first, second = (rounding.weight(module.weight) for _ in range(2))
        assert first.data_ptr() == second.data_ptr()
        (first.sum() + 2 * second.sum()).backward()
    assert module.weight.grad is not None
    assert (module.weight.grad == 3).all()
    with torch.no_grad():
        module.weight.add_(1)
    assert rounding.weight(module.weight).equal(FORMAT.rounded(module.weight))


def test_experts_without_rows_have_nothing_to_round() -> None:
    assert ParameterRounding(FORMAT, Whole(("up",)), (True,)).inputs(torch.empty(0, 256)).shape == (0, 256)
