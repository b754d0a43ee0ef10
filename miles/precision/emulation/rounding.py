"""Which parts of a product are rounded, and how."""

from __future__ import annotations

import dataclasses

import torch

from miles.precision.base import WeightFormat
from miles.precision.rounding import rounded_inputs, rounded_weight


class RowRounding:
    """Rounds inputs. For a model that is never trained it keeps the last ones, as q, k and v share them.

    Models do not write to what they have given to one of these layers and give to the next.
    """

    def __init__(self, weight_format: WeightFormat, *, shares: bool = False) -> None:
        """`shares`: whether the model is never trained."""
        self._format = weight_format
        self._shares = shares
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        """Inputs, and what they are rounded to."""

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Inputs (..., I) as they are multiplied."""
        if not self._shares:
            return rounded_inputs(self._format, rows)
        if self._last is None or self._last[0] is not rows:
            self._last = rows, self._format.rounded_rows(rows)
        return self._last[1]


@dataclasses.dataclass(frozen=True, slots=True)
class Rounding:
    """Of the products with one matrix, or with those of experts in one tensor."""

    weight_format: WeightFormat
    inputs: RowRounding | None
    """None for formats of weights alone."""
    weights: bool
    """Whether weights are rounded; false where those in the module have been rounded already."""

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Inputs (..., I) as they are multiplied."""
        return rows if self.inputs is None else self.inputs(rows)

    def matrix(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight of this name as it is multiplied."""
        return rounded_weight(self.weight_format, name, weight) if self.weights else weight
