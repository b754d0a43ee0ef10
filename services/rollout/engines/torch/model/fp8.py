"""Weights that come as FP8 values and scales: what is computed with, and the proof that it is what came."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from miles.services.rollout.engines.torch.model.parameters import WeightMismatch
from miles.weights.fp8 import SCALE_SUFFIX, dequantise_weights


def quantised_part(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The values and scales among tensors by name, on `device`; empty when none are quantised."""
    scaled = {name.removesuffix(SCALE_SUFFIX) for name in tensors if name.endswith(SCALE_SUFFIX)}
    return {name: t.to(device) for name, t in tensors.items() if name.removesuffix(SCALE_SUFFIX) in scaled}


def as_received(
    served: Mapping[str, torch.Tensor], quantised: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """What is served, by name, with the values and scales that came in the place of the weights made of them.

    Raises WeightMismatch when a served weight is not, bit for bit, what its values and scales stand for.
    """
    made = dequantise_weights(quantised, dtype)
    wrong = [name for name, weight in made.items() if name not in served or not _same(weight, served[name])]
    if wrong:
        raise WeightMismatch(f"not what their FP8 values and scales stand for: {', '.join(wrong[:3])}")
    return {**{name: weight for name, weight in served.items() if name not in made}, **quantised}


def _same(made: torch.Tensor, served: torch.Tensor) -> bool:
    left, right = (tensor.contiguous().view(torch.uint8) for tensor in (made, served))
    return torch.equal(left, right)
