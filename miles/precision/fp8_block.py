"""FP8 values with a scale for each block of 128 × 128 of a weight, and of 1 × 128 of its inputs.

W[o, i] = values[o, i] · scale_inv[o / 128, i / 128], values in e4m3 (finite, largest 448), scales in float32 under the
weight's name and `_scale_inv` (DeepSeek-V3 technical report, section 3.3.2). Arithmetic is TransformerEngine's
(compute_scale_from_amax): values are weight · (448 / amax), and scale_inv is the reciprocal of that factor. Dims: O
outputs, I inputs of a matrix, P and Q blocks along them, N rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from miles.precision.base import Part

BLOCK = 128
VALUES = torch.float8_e4m3fn
LARGEST = 448.0
SCALE_SUFFIX = "_scale_inv"
_LARGEST_FACTOR = torch.finfo(torch.float32).max


class Fp8Block:
    """See `WeightFormat`."""

    largest = LARGEST

    def __init__(self, *, power_of_two_scales: bool = False) -> None:
        self._powers = power_of_two_scales

    def why_not(self, shape: tuple[int, ...]) -> str | None:
        """Every matrix can be: blocks at its edges are smaller."""
        return None

    def parts(self, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Values and scales."""
        return (("", VALUES, shape), (SCALE_SUFFIX, torch.float32, scale_shape(shape)))

    def quantise(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Values (..., O, I) in e4m3 and scales (..., P, Q) in float32.

        A block's largest magnitude becomes 448, or less with scales that are powers of two; values are rounded to the
        nearest, ties to even. Zeros have scale 1.
        """
        factors = self._factors(_block_maxima(weight))
        values = (weight.float() * _spread(factors, weight.shape)).clamp(-LARGEST, LARGEST).to(VALUES)
        return {"": values, SCALE_SUFFIX: 1.0 / factors}

    def dequantise(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """See `WeightFormat.dequantise`."""
        values = parts[""]
        return (values.float() * _spread(parts[SCALE_SUFFIX], values.shape)).to(dtype)

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """See `WeightFormat.rounded`."""
        return self.dequantise(self.quantise(weight), weight.dtype)

    def rounded_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Each row in groups of 128 along its last dimension, the last of which may be smaller."""
        padded = torch.nn.functional.pad(rows.float(), (0, -rows.shape[-1] % BLOCK))
        groups = padded.view(*rows.shape[:-1], -1, BLOCK)
        factors = self._factors(groups.abs().amax(-1, keepdim=True))
        values = (groups * factors).clamp(-LARGEST, LARGEST).to(VALUES)
        rounded: torch.Tensor = (values.float() * (1.0 / factors)).flatten(-2)[..., : rows.shape[-1]].to(rows.dtype)
        return rounded

    def _factors(self, maxima: torch.Tensor) -> torch.Tensor:
        """What values are multiplied by, from the largest magnitudes, float32."""
        factors = (LARGEST / maxima).clamp(max=_LARGEST_FACTOR)
        factors = torch.where((maxima > 0) & maxima.isfinite(), factors, torch.ones_like(factors))
        if self._powers:
            factors = (factors.view(torch.int32) & ~0x7FFFFF).view(torch.float32)
        return factors


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape (..., P, Q) of the scales of a weight (..., O, I)."""
    return (*shape[:-2], *(-(-size // BLOCK) for size in shape[-2:]))


def _block_maxima(weight: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each block of (..., O, I), float32 (..., P, Q)."""
    rows, columns = (-size % BLOCK for size in weight.shape[-2:])
    padded = torch.nn.functional.pad(weight.float().abs(), (0, columns, 0, rows))
    *leading, height, width = padded.shape
    return padded.view(*leading, height // BLOCK, BLOCK, width // BLOCK, BLOCK).amax((-3, -1))


def _spread(scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Each block's scale (..., P, Q) at each of its elements (..., O, I)."""
    spread = scales.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return spread[..., : shape[-2], : shape[-1]]
