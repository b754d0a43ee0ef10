"""A model's tensors by name, quantised and back: implements `miles.weights.export_format.ExportFormat`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from miles.precision.recipe import Recipe
from miles.precision.registry import weight_format
from miles.precision.rounding import as_matrices
from miles.weights.base import WeightsRefused
from miles.weights.export_format import Entry


class QuantisedTensors:
    """Exports each matrix that a recipe covers as its parts, and other tensors unchanged."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._format = weight_format(recipe)

    def layout(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Sequence[Entry]:
        """The parts, or the tensor unchanged."""
        if not self.covers(name, dtype, len(shape)):
            return ((name, dtype, shape),)
        matrices = tuple(as_matrices(name, torch.empty(shape, device="meta")).shape)
        return tuple((name + suffix, kind, size) for suffix, kind, size in self._format.parts(dtype, matrices))

    def convert(self, name: str, tensor: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
        """The tensors of `layout`."""
        if not self.covers(name, tensor.dtype, tensor.dim()):
            return ((name, tensor),)
        parts = self._format.quantise(as_matrices(name, tensor))
        return tuple((name + suffix, part) for suffix, part in parts.items())

    def covers(self, name: str, dtype: torch.dtype, dimensions: int) -> bool:
        """Whether the tensor of this name is quantised."""
        return dtype.is_floating_point and self.recipe.layers.cover(name, dimensions)


def restored(
    recipe: Recipe, expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The tensors of a model whose covered matrices came as parts, dequantised to `dtype`; others as they are.

    Args:
        expected: Shape of each tensor of the model, by name.

    Raises WeightsRefused naming parts that are missing or have another dtype or shape.
    """
    quantised, codec = QuantisedTensors(recipe), weight_format(recipe)
    left, found, faults = dict(tensors), {}, []
    for name, shape in expected.items():
        if not recipe.layers.cover(name, len(shape)):
            continue
        matrices = as_matrices(name, torch.empty(shape, device="meta"))
        layout = quantised.layout(name, dtype, shape)
        parts = {part: left.pop(part, None) for part, _, _ in layout}
        for part, kind, size in layout:
            tensor = parts[part]
            if tensor is None:
                faults.append(f"{part} is missing")
            elif tensor.dtype != kind or tuple(tensor.shape) != size:
                faults.append(f"{part} is {tensor.dtype} {tuple(tensor.shape)} instead of {kind} {size}")
        if not faults:
            by_suffix = {part.removeprefix(name): tensor for part, tensor in parts.items() if tensor is not None}
            found[name] = codec.dequantise(by_suffix, dtype).reshape(matrices.shape).view(shape)
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise WeightsRefused(f"{recipe.format} weights do not fit: {'; '.join(faults[:5])}{more}")
    return found | left
