"""FP8 weights: which tensors are quantised, and a check that the weights served equal their dequantised values."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from miles.weights.fp8 import SCALE_SUFFIX, dequantise_weights
from miles.weights.manifest import ChecksumMismatch


def quantised_part(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The FP8 values and scales among the tensors, by name, on `device`; empty when none are quantised."""
    scaled = {name.removesuffix(SCALE_SUFFIX) for name in tensors if name.endswith(SCALE_SUFFIX)}
    return {name: t.to(device) for name, t in tensors.items() if name.removesuffix(SCALE_SUFFIX) in scaled}


def as_received(
    served: Mapping[str, torch.Tensor], quantised: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The served weights by name, with FP8 values and scales in place of the weights that were dequantised from them.

    Raises ChecksumMismatch when a served weight is not, bit for bit, the dequantised one.
    """
    dequantised = dequantise_weights(quantised, dtype)
    wrong = [name for name, weight in dequantised.items() if name not in served or not _same(weight, served[name])]
    if wrong:
        raise ChecksumMismatch(f"not what their FP8 values and scales stand for: {', '.join(wrong[:3])}")
    return {**{name: weight for name, weight in served.items() if name not in dequantised}, **quantised}


def _same(dequantised: torch.Tensor, served: torch.Tensor) -> bool:
    left, right = (tensor.contiguous().view(torch.uint8) for tensor in (dequantised, served))
    return torch.equal(left, right)
