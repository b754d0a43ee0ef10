"""MXFP8: E4M3 values with a power of two for each 1 × 32 of a weight and of its inputs (OCP MX specification 1.0).

W[o, i] = values[o, i] · 2 ** (scale_inv[o, i / 32] - 127), scales as bytes (UE8M0) under the weight's name and
`_scale_inv`. The exponent is the smallest with which the group's largest magnitude does not exceed 448, as in
TransformerEngine (`float_to_e8m0`); the specification's own example takes floor(log2(amax)) - 8, with which numbers
between 448 and 512 times the scale lose up to an eighth of their size (https://arxiv.org/abs/2506.08027). Dims: O
outputs, I inputs of a matrix, Q groups along I.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from miles.precision.base import Part
from miles.precision.blocks import as_groups, count, from_groups, largest_of_groups
from miles.precision.recipe import MX_GROUP
from miles.precision.small_floats import E4M3, LARGEST_E4M3, powers_of_two, round_to_e4m3_

SCALE_SUFFIX = "_scale_inv"
_MANTISSA_BITS = 23
_ABOVE_448 = 0x1FFFFF
"""Added to a float32's bits it carries into the exponent where the mantissa exceeds that of 448 (1.75)."""
_EXPONENT_OF_448 = 8
_INFINITY = 0x7F800000
_LARGEST_EXPONENT = 254


class MxFp8:
    """See `WeightFormat`."""

    def why_not(self, shape: tuple[int, ...]) -> str | None:
        """Every matrix can be: the last group of a row may be smaller."""
        return None

    def parts(self, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Values, and exponents of their scales."""
        *leading, inputs = shape
        return (("", E4M3, shape), (SCALE_SUFFIX, torch.uint8, (*leading, count(inputs, MX_GROUP))))

    def quantise(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Values (..., O, I) in E4M3 and exponents (..., O, Q) in uint8. A NaN stays one."""
        groups = as_groups(weight, MX_GROUP).float()
        exponents = _exponents(largest_of_groups(groups))
        values = groups * powers_of_two(_LARGEST_EXPONENT - exponents)
        values = from_groups(values.clamp_(-LARGEST_E4M3, LARGEST_E4M3).to(E4M3), weight.shape)
        return {"": values, SCALE_SUFFIX: exponents.squeeze(-1).to(torch.uint8)}

    def dequantise(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """See `WeightFormat.dequantise`."""
        values = parts[""]
        scales = powers_of_two(parts[SCALE_SUFFIX].to(torch.int32)).unsqueeze(-1)
        return from_groups((as_groups(values.float(), MX_GROUP) * scales).to(dtype), values.shape)

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """See `WeightFormat.rounded`."""
        groups = as_groups(weight, MX_GROUP).float()
        exponents = _exponents(largest_of_groups(groups))
        values = round_to_e4m3_(groups * powers_of_two(_LARGEST_EXPONENT - exponents))
        return from_groups(values.mul_(powers_of_two(exponents)).to(weight.dtype), weight.shape)

    def rounded_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """As weights are."""
        return self.rounded(rows)


def _exponents(largest: torch.Tensor) -> torch.Tensor:
    """ceil(log2(largest / 448)) + 127, from 0 to 254, int32."""
    bits = largest.view(torch.int32).clamp(max=_INFINITY)  # of NaN, whose bits differ between devices
    exponents = (bits + _ABOVE_448) >> _MANTISSA_BITS
    return (exponents - _EXPONENT_OF_448).clamp_(0, _LARGEST_EXPONENT)
