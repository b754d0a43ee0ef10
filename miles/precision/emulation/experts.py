"""Mixture-of-experts layers for transformers' experts interface, of padded or grouped products.

The stock implementations multiply as many rows as happen to be routed to an expert, and a matrix library may round a
row differently when there are few others. Padding every product to at least 16 rows makes a token's output independent
of the tokens beside it. The order of the sums is that of the stock eager implementation: ascending expert.

Experts are rounded where the module has an `ExpertsRounding` as its `rounding`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from miles.precision.emulation.rounding import Rounding

PADDED = "miles_padded"
GROUPED = "miles_grouped"
MIN_ROWS = 16


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertsRounding:
    """What is rounded of a layer's experts; None for what is not."""

    gate_up: Rounding | None
    down: Rounding | None


def pad_rows(rows_NH: torch.Tensor, minimum: int = MIN_ROWS) -> torch.Tensor:
    """Append zero rows until there are `minimum`."""
    missing = minimum - rows_NH.shape[0]
    return torch.nn.functional.pad(rows_NH, (0, 0, 0, missing)) if missing > 0 else rows_NH


def padded_experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Route hidden_states (tokens, hidden) through the experts in top_k_index (tokens, k); returns (tokens, hidden)."""
    if not module.has_gate or module.has_bias:
        raise NotImplementedError(f"{type(module).__name__}: only gated experts without biases are supported")
    module, hidden_states = _rounded(module, hidden_states)
    output_NH = torch.zeros_like(hidden_states)
    chosen = [expert for expert in torch.unique(top_k_index).tolist() if expert < module.num_experts]
    places = [torch.where(top_k_index == expert) for expert in chosen]
    if not chosen:
        return output_NH
    gate_ups, downs = (_matrices(weight, module.is_transposed) for weight in (module.gate_up_proj, module.down_proj))
    products = [
        torch.nn.functional.linear(pad_rows(hidden_states[token_M]), gate_ups[expert])
        for expert, (token_M, _) in zip(chosen, places, strict=True)
    ]
    # Of all experts at once, for these are many small operations; cloned, so that products see aligned memory.
    gated = module._apply_gate(torch.cat(products)).split([len(product) for product in products])
    for expert, (token_M, rank_M), rows_MI in zip(chosen, places, gated, strict=True):
        rows_MH = torch.nn.functional.linear(rows_MI.clone(), downs[expert])[: token_M.shape[0]]
        rows_MH = rows_MH * top_k_weights[token_M, rank_M, None]
        output_NH.index_add_(0, token_M, rows_MH.to(output_NH.dtype))
    return output_NH


def grouped_experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The same by grouped products: for GPUs, where one product after the other is slow."""
    module, hidden_states = _rounded(module, hidden_states)
    output_NH: torch.Tensor = grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    return output_NH


def _matrices(weight: torch.Tensor, is_transposed: bool) -> Any:
    """Each expert's matrix (O, I). Where there are gradients by unbinding: it makes one tensor of theirs, not many."""
    weight = weight.transpose(-2, -1) if is_transposed else weight
    return weight.unbind(0) if weight.requires_grad and torch.is_grad_enabled() else weight


def _rounded(module: Any, hidden_states: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """What stands for a module and its inputs whose experts are rounded; both as they are for others."""
    rounding: ExpertsRounding | None = getattr(module, "rounding", None)
    if rounding is None:
        return module, hidden_states
    inputs = hidden_states if rounding.gate_up is None else rounding.gate_up.rows(hidden_states)
    return _RoundedExperts(module, rounding), inputs


class _RoundedExperts:
    """What implementations read of a module, rounded; made anew for each forward pass."""

    def __init__(self, module: Any, rounding: ExpertsRounding) -> None:
        self._module = module
        self._down = rounding.down
        gate_up, down = module.gate_up_proj, module.down_proj
        self.gate_up_proj = gate_up if rounding.gate_up is None else rounding.gate_up.matrix("gate_up_proj", gate_up)
        self.down_proj = down if rounding.down is None else rounding.down.matrix("down_proj", down)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def _apply_gate(self, gate_up_out: torch.Tensor) -> torch.Tensor:
        """The inputs of the down projection, rounded."""
        rows: torch.Tensor = self._module._apply_gate(gate_up_out)
        return rows if self._down is None else self._down.rows(rows)


ExpertsInterface.register(PADDED, padded_experts)
ExpertsInterface.register(GROUPED, grouped_experts)
