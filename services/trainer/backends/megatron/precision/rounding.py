"""What a layer multiplies with in place of its weight and its inputs, with straight-through gradients."""

from __future__ import annotations

from typing import Any

import torch

from miles.precision.base import WeightFormat
from miles.precision.rounding import rounded_inputs
from miles.services.trainer.backends.megatron.precision.matrices import Matrices


class Rounding:
    """Rounds one parameter, and the inputs that it is multiplied with."""

    def __init__(self, weight_format: WeightFormat, matrices: Matrices, covered: tuple[bool, ...]) -> None:
        self._format = weight_format
        self._matrices = matrices
        self._covered = covered

    def weight(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """What exported parts of its matrices stand for, (O, I) in its dtype; gradients go straight through."""
        rounded: torch.Tensor = _StraightThrough.apply(weight_OI, self)  # type: ignore[no-untyped-call]
        return rounded

    def inputs(self, rows: torch.Tensor) -> torch.Tensor:
        """Rounded inputs (..., I), in their dtype; an expert may have no rows."""
        return rounded_inputs(self._format, rows) if rows.numel() else rows

    def values(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """`weight` without gradient."""
        return self._matrices.rounded(weight_OI, self._covered, self._format.rounded)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_OI: torch.Tensor, rounding: Rounding) -> torch.Tensor:
        return rounding.values(weight_OI)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None
