"""Symmetric INT4 weights with a scale for each group along the last dimension, packed as compressed-tensors has them.

s = max(amax / 7, 1e-5) rounded to the weight's dtype, w' = clamp(round(w / s), −7, 7) · s. Eight values, each plus 8,
are in one int32, the first in its lowest bits (compressed-tensors, `pack_quantized`). Dims: O outputs, I inputs, G
groups.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from miles.precision.base import Part

LARGEST = 7
SMALLEST_SCALE = 1e-5
PACKED_SUFFIX, SCALE_SUFFIX, SHAPE_SUFFIX = "_packed", "_scale", "_shape"
_PER_WORD = 8
_OFFSET = 8


class Int4:
    """See `WeightFormat`."""

    largest = float(LARGEST)

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size

    def why_not(self, shape: tuple[int, ...]) -> str | None:
        """The last dimension must be a multiple of the group size."""
        if shape[-1] % self.group_size:
            return f"its rows of {shape[-1]} are no multiple of the group size {self.group_size}"
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
        """See `WeightFormat.quantise`."""
        values, scales = self._values(weight)
        shifts = torch.arange(0, 32, 32 // _PER_WORD, dtype=torch.int32, device=weight.device)
        words = (values.to(torch.int32) + _OFFSET).flatten(-2)
        words = words.view(*words.shape[:-1], -1, _PER_WORD)
        packed = (words << shifts).sum(-1, dtype=torch.int32)
        shape = torch.tensor(weight.shape[-2:], dtype=torch.int64, device=weight.device)
        return {PACKED_SUFFIX: packed, SCALE_SUFFIX: scales.squeeze(-1), SHAPE_SUFFIX: shape}

    def dequantise(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """See `WeightFormat.dequantise`."""
        packed, scales = parts[PACKED_SUFFIX], parts[SCALE_SUFFIX]
        shifts = torch.arange(0, 32, 32 // _PER_WORD, dtype=torch.int32, device=packed.device)
        values = ((packed.unsqueeze(-1) >> shifts) & 0xF).flatten(-2) - _OFFSET
        groups = values.float().view(*scales.shape, -1)
        weight: torch.Tensor = (groups * scales.float().unsqueeze(-1)).flatten(-2).to(dtype)
        return weight

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """See `WeightFormat.rounded`."""
        values, scales = self._values(weight)
        return (values * scales.float()).flatten(-2).to(weight.dtype)

    def rounded_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows: inputs are not quantised."""
        return rows

    def _values(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (..., O, G, group) as whole float32 numbers, and scales (..., O, G, 1) in the weight's dtype."""
        problem = self.why_not(tuple(weight.shape))
        if problem is not None:
            raise ValueError(f"a weight of shape {tuple(weight.shape)} cannot be INT4: {problem}")
        groups = weight.float().reshape(*weight.shape[:-1], -1, self.group_size)
        scales = (groups.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=SMALLEST_SCALE).to(weight.dtype)
        return (groups / scales.float()).round().clamp(-LARGEST, LARGEST), scales
