"""Weights that come quantised: served dequantised, and given back as they came."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from miles.precision.recipe import Recipe
from miles.precision.tensors import QuantisedTensors, restored
from miles.weights.manifest import ChecksumMismatch


class QuantisedWeights:
    """The parts of the weights that are served, as they were received."""

    def __init__(
        self, recipe: Recipe, expected: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device
    ) -> None:
        """`expected`: shape of each tensor of the model, by name. Weights are served in `dtype`."""
        self._recipe = recipe
        self._expected = expected
        self._dtype = dtype
        self._device = device
        quantised = QuantisedTensors(recipe)
        self._names = {
            part: name
            for name, shape in expected.items()
            if quantised.covers(name, dtype, len(shape))
            for part, _, _ in quantised.layout(name, dtype, shape)
        }
        """The matrix of each part."""
        self._parts: dict[str, torch.Tensor] = {}

    def parts_of(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parts of matrices among the tensors, by name, on the device."""
        return {name: tensor.to(self._device) for name, tensor in tensors.items() if name in self._names}

    def restored(
        self, tensors: Mapping[str, torch.Tensor], parts: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """All tensors with the matrices that their parts stand for. Raises WeightsRefused for parts that do not fit."""
        return restored(self._recipe, self._expected, {**tensors, **parts}, self._dtype)

    def keep(self, parts: Mapping[str, torch.Tensor]) -> None:
        """Note what is served from now on."""
        self._parts = dict(parts)

    def as_received(self, served: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The served weights by name, with parts in place of the matrices.

        Raises ChecksumMismatch when a served matrix is not, bit for bit, the one that its parts stand for.
        """
        matrices = restored(self._recipe, self._expected, self._parts, self._dtype)
        wrong = [name for name, weight in matrices.items() if name not in served or not _same(weight, served[name])]
        if wrong:
            problem = f"not what their {self._recipe.format} values and scales stand for"
            raise ChecksumMismatch(f"{problem}: {', '.join(wrong[:3])}")
        return {**{name: weight for name, weight in served.items() if name not in matrices}, **self._parts}


def _same(dequantised: torch.Tensor, served: torch.Tensor) -> bool:
    left, right = (tensor.contiguous().view(torch.uint8) for tensor in (dequantised, served))
    return torch.equal(left, right)
