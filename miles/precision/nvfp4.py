"""NVFP4: E2M1 values with an E4M3 scale for each 1 × 16 and a float32 scale for the matrix (or for a row of inputs).

W[o, i] = values[o, i] · (scale[o, i / 16] · scale_2). Two values are in a byte, the first in its lower half; names of
the parts are those of ModelOpt. Arithmetic is TransformerEngine's (`NVFP4QuantizerRef` with tiles of 1 × 16, without
Hadamard transform and stochastic rounding). An input has a float32 scale for each row (TransformerEngine's
row_scaled_nvfp4), so that a row is rounded the same way whatever else is in the batch. Dims: O outputs, I inputs of a
matrix, G groups along I.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from miles.precision.base import Part
from miles.precision.blocks import as_groups, count, from_groups, largest_of_groups
from miles.precision.nibbles import pack, unpack
from miles.precision.recipe import NV_GROUP
from miles.precision.small_floats import E4M3, LARGEST_E2M1, LARGEST_E4M3, round_to_e2m1_

SCALE_SUFFIX, MATRIX_SCALE_SUFFIX = "_scale", "_scale_2"
_LARGEST_FACTOR = torch.finfo(torch.float32).max
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of codes 0 to 7; the fourth bit is the sign."""
_BETWEEN = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


class NvFp4:
    """See `WeightFormat`."""

    def why_not(self, shape: tuple[int, ...]) -> str | None:
        """Two values share a byte."""
        return f"its rows of {shape[-1]} are of an odd length" if shape[-1] % 2 else None

    def parts(self, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Values two a byte, scales of groups and of the matrix."""
        *leading, outputs, inputs = shape
        return (
            ("", torch.uint8, (*leading, outputs, inputs // 2)),
            (SCALE_SUFFIX, E4M3, (*leading, outputs, count(inputs, NV_GROUP))),
            (MATRIX_SCALE_SUFFIX, torch.float32, (*leading, 1)),
        )

    def quantise(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `WeightFormat.quantise`. One number that is not finite makes the matrix NaN."""
        problem = self.why_not(tuple(weight.shape))
        if problem is not None:
            raise ValueError(f"a weight of shape {tuple(weight.shape)} cannot be NVFP4: {problem}")
        groups = as_groups(weight, NV_GROUP).float()
        scales, matrix_scales = _scales(largest_of_groups(groups), dims=(-3, -2))
        values = from_groups(_values(groups, scales.float() * matrix_scales), weight.shape)
        codes = torch.bucketize(values.abs(), values.new_tensor(_BETWEEN), out_int32=True).to(torch.uint8)
        return {
            "": pack(codes | (values.signbit().to(torch.uint8) << 3)),
            SCALE_SUFFIX: scales.squeeze(-1),
            MATRIX_SCALE_SUFFIX: matrix_scales.flatten(-3),
        }

    def dequantise(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """See `WeightFormat.dequantise`."""
        codes = unpack(parts[""])
        table = torch.tensor((*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES)), device=codes.device)
        scales = parts[SCALE_SUFFIX].float() * parts[MATRIX_SCALE_SUFFIX].unsqueeze(-1)
        values = as_groups(table[codes.int()], NV_GROUP)
        return from_groups((values * scales.unsqueeze(-1)).to(dtype), codes.shape)

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """See `WeightFormat.rounded`."""
        return _rounded(weight, dims=(-3, -2))

    def rounded_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """As weights are, with a scale for each row instead of one for the matrix."""
        return _rounded(rows, dims=(-2,))


def _rounded(matrix: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    groups = as_groups(matrix, NV_GROUP).float()
    scales, second = _scales(largest_of_groups(groups), dims)
    products = scales.float() * second
    return from_groups(_values(groups, products).mul_(products).to(matrix.dtype), matrix.shape)


def _scales(largest: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales (..., G, 1) in E4M3 of groups with these largest magnitudes, and float32 scales over `dims`, kept as 1.

    Divides tensors by tensors: PyTorch multiplies by a reciprocal where one of them is a number.
    """
    total = largest.amax(dims, keepdim=True)
    factors = (torch.full_like(total, LARGEST_E4M3 * LARGEST_E2M1) / total).clamp_(max=_LARGEST_FACTOR)
    factors = torch.where((total == 0) | (factors == 0), 1.0, factors)
    scales = (largest * (factors * (1 / LARGEST_E2M1))).clamp_(max=LARGEST_E4M3).to(E4M3)
    return scales, factors.reciprocal()


def _values(groups: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Values of E2M1 as float32 numbers, of groups (..., G, size) with products of both scales (..., G, 1)."""
    return round_to_e2m1_(groups * scales.reciprocal().clamp_(max=_LARGEST_FACTOR))
