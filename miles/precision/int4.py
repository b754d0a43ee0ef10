"""Symmetric INT4 weights with a scale for each group along the last dimension, packed as compressed-tensors has them.

s = max(amax / 7, 1e-5) rounded to the weight's dtype, w' = round(w / s) · s, rounded to the nearest, ties to even.
Eight values, each plus 8, are in one int32, the first in its lowest bits (compressed-tensors, `pack_quantized`). Dims:
O outputs, I inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch

from miles.precision.base import Part
from miles.precision.blocks import as_groups, largest_of_groups
from miles.precision.gpu import kernels_for
from miles.precision.nibbles import pack, unpack

LARGEST = 7
SMALLEST_SCALE = 1e-5
PACKED_SUFFIX, SCALE_SUFFIX, SHAPE_SUFFIX = "_packed", "_scale", "_shape"
_PER_WORD = 8
_OFFSET = 8


class Int4:
    """See `WeightFormat`."""

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size

    def why_not(self, shape: tuple[int, ...]) -> str | None:
        """The last dimension must be a multiple of the group size, and of the eight values of a word."""
        if shape[-1] % self.group_size:
            return f"its rows of {shape[-1]} are no multiple of the group size {self.group_size}"
        if shape[-1] % _PER_WORD:
            return f"its rows of {shape[-1]} are no multiple of the {_PER_WORD} values in an int32"
        return None

    def parts(self, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Packed values, scales in the weight's dtype, and the matrix's shape."""
        *leading, inputs = shape
        return (
            (PACKED_SUFFIX, torch.int32, (*leading, inputs // _PER_WORD)),
            (SCALE_SUFFIX, dtype, (*leading, inputs // self.group_size)),
            (SHAPE_SUFFIX, torch.int64, (2,)),
        )

    def quantise(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `WeightFormat.quantise`. A group with a number that is not finite has such a scale."""
        values, scales = self._values(weight)
        codes = values.nan_to_num_(0.0).add_(_OFFSET).to(torch.uint8)
        shape = torch.tensor(weight.shape[-2:], dtype=torch.int64, device=weight.device)
        packed = pack(codes.flatten(-2)).view(torch.int32)
        return {PACKED_SUFFIX: packed, SCALE_SUFFIX: scales.squeeze(-1), SHAPE_SUFFIX: shape}

    def dequantise(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """See `WeightFormat.dequantise`."""
        scales = parts[SCALE_SUFFIX].float().unsqueeze(-1)
        values = unpack(parts[PACKED_SUFFIX].contiguous().view(torch.uint8)).float().sub_(_OFFSET)
        return as_groups(values, self.group_size).mul_(scales).flatten(-2).to(dtype)

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """See `WeightFormat.rounded`."""
        kernels = kernels_for(weight)
        if kernels is not None and self.why_not(tuple(weight.shape)) is None and self.group_size.bit_count() == 1:
            return cast(torch.Tensor, kernels.round_int4(weight, self.group_size, SMALLEST_SCALE))
        values, scales = self._values(weight)
        return values.mul_(scales.float()).flatten(-2).to(weight.dtype)

    def rounded_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows: inputs are not quantised."""
        return rows

    def _values(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole float32 numbers (..., O, G, group) from -7 to 7, and scales (..., O, G, 1) in the weight's dtype.

        Divides tensors by tensors: PyTorch multiplies by a reciprocal where one of them is a number. A scale is too
        small by half a unit in its last place at most, so that no quotient exceeds 7.03. Zero is added because an INT4
        zero has no sign.
        """
        problem = self.why_not(tuple(weight.shape))
        if problem is not None:
            raise ValueError(f"a weight of shape {tuple(weight.shape)} cannot be INT4: {problem}")
        groups = as_groups(weight, self.group_size).float()
        largest = largest_of_groups(groups)
        scales = (largest / torch.full_like(largest, LARGEST)).clamp_(min=SMALLEST_SCALE).to(weight.dtype)
        return (groups / scales.float()).round_().add_(0.0), scales
