"""Weights as FP8 values with a scale for each block of 128 × 128, as DeepSeek-V3's checkpoints have them.

W[o, i] = values[o, i] · scale_inv[o / 128, i / 128], values in e4m3 (finite, largest 448), scales in float32 under the
weight's name and `_scale_inv` (DeepSeek-V3 technical report, section 3.3.2). Dims: O outputs, I inputs of a matrix, P
and Q blocks along them; leading dimensions (experts held in one tensor) are matrices of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from miles.weights.base import WeightsRefused
from miles.weights.export_format import Entry

BLOCK = 128
VALUES = torch.float8_e4m3fn
LARGEST = 448.0
SCALE_SUFFIX = "_scale_inv"

HIGH_PRECISION_MODULES = ("embed_tokens", "wte", "wpe", "lm_head", "gate", "router", "shared_expert_gate")
"""Last parts of the names of modules that are not quantised: embeddings, head and routers. Norms and biases, which have
one dimension, are not either."""


class Fp8Blocks:
    """Exports every matrix as FP8 values and scales, except those kept in high precision; implements ExportFormat."""

    def __init__(self, high_precision: Sequence[str] = ()) -> None:
        """`high_precision`: parts of names of further weights that are not quantised."""
        self._high_precision = tuple(high_precision)

    def layout(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Sequence[Entry]:
        """Values and scales, or the tensor unchanged."""
        if not self._converts(name, dtype, len(shape)):
            return ((name, dtype, shape),)
        return ((name, VALUES, shape), (name + SCALE_SUFFIX, torch.float32, scale_shape(shape)))

    def convert(self, name: str, tensor: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
        """The tensors of `layout`."""
        if not self._converts(name, tensor.dtype, tensor.dim()):
            return ((name, tensor),)
        values, scales = quantise(tensor)
        return ((name, values), (name + SCALE_SUFFIX, scales))

    def _converts(self, name: str, dtype: torch.dtype, dimensions: int) -> bool:
        module = name.removesuffix(".weight").rpartition(".")[2]
        kept = module in HIGH_PRECISION_MODULES or any(part in name for part in self._high_precision)
        return dtype.is_floating_point and dimensions >= 2 and not kept


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape (..., P, Q) of the scales of a weight (..., O, I)."""
    return (*shape[:-2], *(-(-size // BLOCK) for size in shape[-2:]))


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a weight: values (..., O, I) in e4m3 and scales (..., P, Q) in float32.

    A block's largest magnitude becomes 448; values are rounded to the nearest, ties to even. Zeros have scale 1.
    """
    scales = _block_maxima(weight) / LARGEST
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    values = (weight.float() / _spread(scales, weight.shape)).clamp(-LARGEST, LARGEST).to(VALUES)
    return values, scales


def dequantise(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Dequantise a weight (..., O, I): computed in float32 and rounded once to `dtype`."""
    return (values.float() * _spread(scales, values.shape)).to(dtype)


def dequantise_weights(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Dequantise every pair of values and scales by name to one weight in `dtype`; return other tensors unchanged.

    Raises WeightsRefused naming scales without values, values without scales, and scales of another shape.
    """
    scales = {name.removesuffix(SCALE_SUFFIX): t for name, t in tensors.items() if name.endswith(SCALE_SUFFIX)}
    faults = [f"{name}{SCALE_SUFFIX} has no values {name}" for name in scales if name not in tensors]
    weights = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE_SUFFIX):
            continue
        if (tensor.dtype == VALUES) != (name in scales):
            faults.append(f"{name} is {tensor.dtype}, {'with' if name in scales else 'without'} scales")
        elif name not in scales:
            weights[name] = tensor
        elif scales[name].shape != scale_shape(tuple(tensor.shape)):
            faults.append(f"{name}{SCALE_SUFFIX} has shape {tuple(scales[name].shape)} for {tuple(tensor.shape)}")
        else:
            weights[name] = dequantise(tensor, scales[name], dtype)
    if faults:
        raise WeightsRefused(f"FP8 weights do not pair up: {'; '.join(faults)}")
    return weights


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
