"""A model's tensors by name, quantised and back: implements `miles.weights.export_format.ExportFormat`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from miles.precision.recipe import Recipe
from miles.precision.registry import weight_format
from miles.precision.rounding import as_matrices
from miles.weights.base import WeightsRefused
from miles.weights.export_format import Entry

_SHOWN = 5


class QuantisedTensors:
    """Exports each matrix that a recipe covers as its parts, and other tensors unchanged."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._format = weight_format(recipe)

    def layout(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Sequence[Entry]:
        """The parts, or the tensor unchanged. Raises ValueError for a matrix that the format cannot hold."""
        if not self.covers(name, dtype, len(shape)):
            return ((name, dtype, shape),)
        matrices = _matrices(name, shape)
        problem = self._format.why_not(matrices)
        if problem is not None:
            way_out = "choose another group size, or name it in extra_high_precision_layers_hf"
            raise ValueError(f"{name} cannot be {self.recipe.format}: {problem}; {way_out}")
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

    Raises WeightsRefused naming parts that are missing or have another dtype or shape, before anything is dequantised,
    and ValueError for a matrix that the format cannot hold.
    """
    quantised, codec = QuantisedTensors(recipe), weight_format(recipe)
    left, came, faults = dict(tensors), {}, []
    for name, shape in expected.items():
        if not quantised.covers(name, dtype, len(shape)):
            continue
        layout = quantised.layout(name, dtype, shape)
        parts = {part: left.pop(part, None) for part, _, _ in layout}
        faults += [fault for part, kind, size in layout if (fault := _fault(part, parts[part], kind, size))]
        came[name] = {part.removeprefix(name): tensor for part, tensor in parts.items() if tensor is not None}
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise WeightsRefused(f"{recipe.format} weights do not fit: {'; '.join(faults[:_SHOWN])}{more}")
    return {name: codec.dequantise(parts, dtype).view(expected[name]) for name, parts in came.items()} | left


def _matrices(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(as_matrices(name, torch.empty(shape, device="meta")).shape)


def _fault(part: str, tensor: torch.Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    if tensor is None:
        return f"{part} is missing"
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        return f"{part} is {tensor.dtype} {tuple(tensor.shape)} instead of {dtype} {shape}"
    return None
