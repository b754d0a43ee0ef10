"""Mixture-of-experts layers with every matmul padded to at least 16 rows, for transformers' experts interface.

The stock implementations multiply as many rows as happen to be routed to an expert, and a matrix library may round a
row differently when there are few others. Padding makes a token's output independent of the tokens beside it. The
order of the sums is that of the stock eager implementation: ascending expert.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import ExpertsInterface

EXPERTS_NAME = "miles_padded"
MIN_ROWS = 16


def pad_rows(rows_NH: torch.Tensor, minimum: int = MIN_ROWS) -> torch.Tensor:
    """Append zero rows until there are `minimum`."""
    missing = minimum - rows_NH.shape[0]
    return torch.nn.functional.pad(rows_NH, (0, 0, 0, missing)) if missing > 0 else rows_NH


def padded_experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Route hidden_states (tokens, hidden) through the experts in top_k_index (tokens, k); returns (tokens, hidden)."""
    output_NH = torch.zeros_like(hidden_states)
    if not module.has_gate or module.has_bias:
        raise NotImplementedError(f"{type(module).__name__}: only gated experts without biases are supported")
    for expert in torch.unique(top_k_index).tolist():
        if expert >= module.num_experts:
            continue
        token_M, rank_M = torch.where(top_k_index == expert)
        rows_MH = pad_rows(hidden_states[token_M])
        gate_up, down = module.gate_up_proj[expert], module.down_proj[expert]
        if module.is_transposed:
            gate_up, down = gate_up.T, down.T
        rows_MI = module._apply_gate(torch.nn.functional.linear(rows_MH, gate_up))
        rows_MH = torch.nn.functional.linear(rows_MI, down)[: token_M.shape[0]]
        rows_MH = rows_MH * top_k_weights[token_M, rank_M, None]
        output_NH.index_add_(0, token_M, rows_MH.to(output_NH.dtype))
    return output_NH


ExpertsInterface.register(EXPERTS_NAME, padded_experts)
