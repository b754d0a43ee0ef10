"""Linear layers of rounded numbers: outputs and gradients by their formulas."""

from __future__ import annotations

import pytest
import torch

from miles.precision.emulation.linear import RoundedLinear
from miles.precision.emulation.rounding import Rounding, RowRounding
from miles.precision.recipe import Recipe
from miles.precision.registry import weight_format

RECIPES = [
    Recipe(format="fp8_block"),
    Recipe(format="int4", group_size=16),
    Recipe(format="mxfp8"),
    Recipe(format="nvfp4"),
]


def layer(seed: int = 0) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(144, 40)


def rounding(recipe: Recipe, *, weights: bool = True) -> Rounding:
    codec = weight_format(recipe)
    return Rounding(codec, RowRounding(codec) if recipe.rounds_inputs else None, weights)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.format)
def test_outputs_and_gradients_are_those_of_rounded_numbers_passed_straight_through(recipe: Recipe) -> None:
    stock, codec = layer(), weight_format(recipe)
    x_NI = torch.randn(3, 5, 144, requires_grad=True)
    grad_NO = torch.randn(3, 5, 40)
    y_NO = RoundedLinear(stock, rounding(recipe))(x_NI)
    y_NO.backward(grad_NO)
    with torch.no_grad():
        parts = codec.quantise(stock.weight)
        w_OI = codec.dequantise(parts, torch.float32)
        assert not torch.equal(w_OI, stock.weight)
        rounded_NI = codec.rounded_rows(x_NI)
        assert torch.equal(rounded_NI, x_NI) is not recipe.rounds_inputs
        assert torch.equal(y_NO, torch.nn.functional.linear(rounded_NI, w_OI, stock.bias))
        torch.testing.assert_close(x_NI.grad, grad_NO @ w_OI)
        expected_OI = grad_NO.reshape(-1, 40).T @ rounded_NI.reshape(-1, 144)
        torch.testing.assert_close(stock.weight.grad, expected_OI)
        torch.testing.assert_close(stock.bias.grad, grad_NO.sum((0, 1)))


def test_a_layer_whose_weights_are_rounded_already_rounds_its_inputs_alone() -> None:
    stock, recipe = layer(), RECIPES[0]
    codec = weight_format(recipe)
    x_NI = torch.randn(7, 144)
    found_NO = RoundedLinear(stock, rounding(recipe, weights=False))(x_NI)
    assert torch.equal(found_NO, torch.nn.functional.linear(codec.rounded_rows(x_NI), stock.weight, stock.bias))


@torch.inference_mode()
def test_inputs_that_layers_share_are_rounded_once_and_others_anew() -> None:
    rows = RowRounding(weight_format(RECIPES[0]), shares=True)
    x_NI = torch.randn(7, 144)
    first = rows(x_NI)
    assert rows(x_NI) is first
    other = rows(x_NI * 2)
    assert torch.equal(other, first * 2)
    assert torch.equal(rows(x_NI), first)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.format)
def test_a_row_comes_out_the_same_whatever_rows_are_beside_it(recipe: Recipe) -> None:
    rounded = RoundedLinear(layer(), rounding(recipe))
    x_NI = torch.randn(64, 144)
    x_NI[40:] *= 1000
    with torch.no_grad():
        assert torch.equal(rounded(x_NI)[:32], rounded(x_NI[:32]))
