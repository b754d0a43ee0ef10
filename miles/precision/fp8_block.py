"""FP8 values with a scale for each block of 128 × 128 of a weight, and of 1 × 128 of its inputs.

W[o, i] = values[o, i] · scale_inv[o / 128, i / 128], values in E4M3 (finite, largest 448), scales in float32 under the
weight's name and `_scale_inv` (DeepSeek-V3 technical report, section 3.3.2). Arithmetic is TransformerEngine's
(compute_scale_from_amax): values are weight · (448 / amax), and scale_inv is the reciprocal of that factor. Dims: O
outputs, I inputs of a matrix, P and Q blocks along them, N rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch

from miles.precision.base import Part
from miles.precision.blocks import (
    as_blocks,
    as_groups,
    count,
    from_blocks,
    from_groups,
    largest_of_blocks,
    largest_of_groups,
)
from miles.precision.gpu import kernels_for
from miles.precision.recipe import FP8_BLOCK
from miles.precision.small_floats import E4M3, LARGEST_E4M3, round_to_e4m3_

SCALE_SUFFIX = "_scale_inv"
_MANTISSA = 0x7FFFFF


class Fp8Block:
    """See `WeightFormat`."""

    def __init__(self, *, power_of_two_scales: bool = False) -> None:
        self._powers = power_of_two_scales

    def why_not(self, shape: tuple[int, ...]) -> str | None:
        """Every matrix can be: blocks at its edges are smaller."""
        return None

    def parts(self, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Values and scales."""
        return (("", E4M3, shape), (SCALE_SUFFIX, torch.float32, scale_shape(shape)))

    def quantise(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Values (..., O, I) in E4M3 and scales (..., P, Q) in float32.

        A block's largest magnitude becomes 448, or less with scales that are powers of two; values are rounded to the
        nearest, ties to even. Zeros have scale 1, and so have blocks with a number that is not finite: infinity
        becomes 448, as in TransformerEngine, and NaN stays.
        """
        blocks = as_blocks(weight, FP8_BLOCK, FP8_BLOCK).float()
        factors = self._factors(largest_of_blocks(blocks), weight.dtype)
        values = (blocks * factors).clamp_(-LARGEST_E4M3, LARGEST_E4M3).to(E4M3)
        return {"": from_blocks(values, weight.shape), SCALE_SUFFIX: factors.reciprocal().squeeze(-1).squeeze(-2)}

    def dequantise(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """See `WeightFormat.dequantise`."""
        values = parts[""]
        blocks = as_blocks(values.float(), FP8_BLOCK, FP8_BLOCK) * parts[SCALE_SUFFIX].unsqueeze(-2).unsqueeze(-1)
        return from_blocks(blocks.to(dtype), values.shape)

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """See `WeightFormat.rounded`."""
        kernels = kernels_for(weight)
        if kernels is not None:
            return cast(torch.Tensor, kernels.round_fp8_weight(weight, self._powers))
        blocks = as_blocks(weight, FP8_BLOCK, FP8_BLOCK).float()
        factors = self._factors(largest_of_blocks(blocks), weight.dtype)
        return from_blocks(_rounded(blocks, factors, weight.dtype), weight.shape)

    def rounded_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Each row in groups of 128 along its last dimension, the last of which may be smaller."""
        kernels = kernels_for(rows)
        if kernels is not None:
            return cast(torch.Tensor, kernels.round_fp8_rows(rows, self._powers))
        groups = as_groups(rows, FP8_BLOCK).float()
        factors = self._factors(largest_of_groups(groups), rows.dtype)
        return from_groups(_rounded(groups, factors, rows.dtype), rows.shape)

    def _factors(self, largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What numbers are multiplied by, from the largest magnitudes in a block of them, float32.

        Divides a tensor by a tensor: PyTorch multiplies by a reciprocal where one of them is a number.
        """
        factors = (torch.full_like(largest, LARGEST_E4M3) / largest).nan_to_num_(posinf=torch.finfo(dtype).max)
        factors = torch.where((largest > 0) & (factors > 0), factors, 1.0)  # of 0, infinity and NaN
        return (factors.view(torch.int32) & ~_MANTISSA).view(torch.float32) if self._powers else factors


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape (..., P, Q) of the scales of a weight (..., O, I)."""
    return (*shape[:-2], *(count(size, FP8_BLOCK) for size in shape[-2:]))


def _rounded(blocks: torch.Tensor, factors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return round_to_e4m3_(blocks * factors).mul_(factors.reciprocal()).to(dtype)
