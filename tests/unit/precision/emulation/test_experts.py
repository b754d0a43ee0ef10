"""Mixture-of-experts layers that see at least 16 rows, and those of rounded numbers."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from miles.precision.emulation.experts import GROUPED, PADDED, ExpertsRounding
from miles.precision.emulation.rounding import Rounding, RowRounding
from miles.precision.recipe import Recipe
from miles.precision.registry import weight_format
from miles.precision.rounding import as_matrices


def experts(dtype: torch.dtype) -> tuple[Qwen3MoeExperts, Qwen3MoeConfig]:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=96, moe_intermediate_size=32, num_experts=6, num_experts_per_tok=2)
    module = Qwen3MoeExperts(config)
    torch.nn.init.normal_(module.gate_up_proj, std=0.2)
    torch.nn.init.normal_(module.down_proj, std=0.2)
    return module.to(dtype).requires_grad_(False), config


def test_padded_experts_equal_the_stock_ones() -> None:
    module, config = experts(torch.float32)
    hidden, weights = torch.randn(40, 96), torch.rand(40, 2)
    chosen = torch.rand(40, 6).topk(2).indices
    config._experts_implementation = "eager"
    expected = module(hidden, chosen, weights)
    config._experts_implementation = PADDED
    torch.testing.assert_close(module(hidden, chosen, weights), expected, atol=1e-5, rtol=0)


def test_a_token_comes_out_the_same_whatever_tokens_are_beside_it() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        module, config = experts(dtype)
        config._experts_implementation = PADDED
        hidden, weights = torch.randn(200, 96).to(dtype), torch.rand(200, 2).to(dtype)
        chosen = torch.rand(200, 6).topk(2).indices
        together = module(hidden, chosen, weights)
        for rows in (1, 5, 37):
            assert torch.equal(module(hidden[:rows], chosen[:rows], weights[:rows]), together[:rows])


def rounding_of(recipe: Recipe) -> Rounding:
    codec = weight_format(recipe)
    return Rounding(codec, RowRounding(codec) if recipe.rounds_inputs else None, weights=True)


def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, chosen experts and their weights."""
    return torch.randn(rows, 96), torch.rand(rows, 6).topk(2).indices, torch.rand(rows, 2)


@pytest.mark.parametrize("name", ["fp8_block", "int4"])
@pytest.mark.parametrize("implementation", [PADDED, GROUPED])
def test_rounded_experts_equal_those_of_their_formula_with_gradients(implementation: str, name: str) -> None:
    recipe = Recipe(format=name, group_size=32)  # type: ignore[arg-type]
    codec, rounding = weight_format(recipe), rounding_of(recipe)
    module, config = experts(torch.float32)
    module.requires_grad_(True)
    hidden, chosen, weights = inputs(40)
    hidden.requires_grad_(True)
    module.rounding = ExpertsRounding(rounding, rounding)
    config._experts_implementation = implementation
    found = module(hidden, chosen, weights)
    grad = torch.randn_like(found)
    found.backward(grad)
    got = [hidden.grad, module.gate_up_proj.grad, module.down_proj.grad]

    gate_up = codec.rounded(as_matrices("gate_up_proj", module.gate_up_proj.detach())).view_as(module.gate_up_proj)
    gate_up, down = gate_up.requires_grad_(True), codec.rounded(module.down_proj.detach()).requires_grad_(True)
    rows = codec.rounded_rows(hidden.detach()).requires_grad_(True)
    expected = []
    for row in range(len(rows)):
        parts = []
        for expert, weight in zip(chosen[row].tolist(), weights[row], strict=True):
            inner = module._apply_gate(gate_up[expert] @ rows[row])
            straight = inner + (codec.rounded_rows(inner.detach()[None])[0] - inner.detach())
            parts.append(weight * (down[expert] @ straight))
        expected.append(sum(parts))
    torch.testing.assert_close(found, torch.stack(expected), atol=2e-4, rtol=1e-4)
    torch.stack(expected).backward(grad)
    for left, right in zip(got, (rows.grad, gate_up.grad, down.grad), strict=True):
        torch.testing.assert_close(left, right, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_a_token_of_rounded_experts_comes_out_the_same_whatever_tokens_are_beside_it() -> None:
    rounding = rounding_of(Recipe(format="fp8_block"))
    module, config = experts(torch.float32)
    module.rounding = ExpertsRounding(rounding, rounding)
    config._experts_implementation = PADDED
    hidden, chosen, weights = inputs(200)
    together = module(hidden, chosen, weights)
    for rows in (1, 5, 37):
        assert torch.equal(module(hidden[:rows], chosen[:rows], weights[:rows]), together[:rows])


@torch.no_grad()
def test_a_matrix_that_is_not_covered_is_multiplied_as_it_is() -> None:
    rounding = rounding_of(Recipe(format="fp8_block"))
    module, config = experts(torch.float32)
    config._experts_implementation = PADDED
    given = inputs(20)
    plain = module(*given)
    found = []
    for parts in ((None, None), (rounding, None), (None, rounding), (rounding, rounding)):
        module.rounding = ExpertsRounding(*parts)
        found.append(module(*given))
    assert torch.equal(found[0], plain)
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
