"""A linear layer of rounded numbers."""

from __future__ import annotations

import torch

from miles.precision.emulation.rounding import Rounding


class RoundedLinear(torch.nn.Linear):
    """round(x) · round(W)^T + b, with the parameters of the layer that it takes the place of."""

    def __init__(self, layer: torch.nn.Linear, rounding: Rounding) -> None:
        """Take over the layer's parameters."""
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta", dtype=layer.weight.dtype)
        self.weight, self.bias = layer.weight, layer.bias
        self.rounding = rounding

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Outputs (..., O) of inputs (..., I)."""
        weight = self.rounding.matrix("weight", self.weight)
        return torch.nn.functional.linear(self.rounding.rows(input), weight, self.bias)
