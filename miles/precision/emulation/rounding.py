"""Which parts of a product are rounded, and how."""

from __future__ import annotations

import dataclasses

import torch

from miles.precision.base import WeightFormat
from miles.precision.rounding import rounded_inputs, rounded_weight


@dataclasses.dataclass(frozen=True, slots=True)
class Rounding:
    """Of the products with one matrix, or with those of experts in one tensor."""

    weight_format: WeightFormat
    inputs: bool
    """Whether inputs are rounded; formats of weights alone leave them as they are."""
    weights: bool
    """Whether weights are; false where those in the module have been rounded already."""

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Inputs (..., I) as they are multiplied."""
        return rounded_inputs(self.weight_format, rows) if self.inputs else rows

    def matrix(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight of this name as it is multiplied."""
        return rounded_weight(self.weight_format, name, weight) if self.weights else weight
