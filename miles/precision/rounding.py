"""What training computes with: matrices and their inputs rounded to a format, with straight-through gradients.

The gradient of rounding is taken as that of the identity (Bengio et al. 2013, https://arxiv.org/abs/1308.3432).
"""

from __future__ import annotations

from typing import Any

import torch

from miles.precision.base import WeightFormat


def as_matrices(name: str, weight: torch.Tensor) -> torch.Tensor:
    """A view of a weight in which no matrix of the checkpoint form shares a block with another one.

    Gates and ups of experts, (E, 2 · I, H) in the module form, are (E, 2, I, H) then; others are as they are.
    """
    if weight.dim() == 3 and name.rpartition(".")[2] == "gate_up_proj":
        return weight.view(weight.shape[0], 2, -1, weight.shape[-1])
    return weight


def rounded_weight(weight_format: WeightFormat, name: str, weight: torch.Tensor) -> torch.Tensor:
    """The weight that its quantised parts stand for, in its shape and dtype; gradients go straight through."""
    found: torch.Tensor = _Weight.apply(weight, weight_format, name)  # type: ignore[no-untyped-call]
    return found


def rounded_inputs(weight_format: WeightFormat, rows: torch.Tensor) -> torch.Tensor:
    """Inputs (..., I) of a matrix as it is multiplied with them; gradients go straight through."""
    found: torch.Tensor = _Rows.apply(rows, weight_format)  # type: ignore[no-untyped-call]
    return found


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, weight_format: WeightFormat, name: str) -> torch.Tensor:
        return weight_format.rounded(as_matrices(name, weight)).view(weight.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0], None, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight_format: WeightFormat) -> torch.Tensor:
        return weight_format.rounded_rows(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None
