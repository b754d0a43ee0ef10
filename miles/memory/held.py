"""Weights as a recipe holds them: matrices that it covers in its format, other tensors as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from miles.memory.amount import number
from miles.memory.parameters import Parameters, counted
from miles.memory.tensors import Tensors
from miles.precision.recipe import Recipe
from miles.precision.sizes import stored_bytes

_FLOAT32 = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Held:
    """What some tensors take."""

    format: str | None
    """None: nothing is quantised."""
    covered: int
    """Parameters that are quantised."""
    covered_bytes: int
    """Theirs, with scales."""
    others: int
    """Other parameters."""
    other_bytes: int
    each: int
    """Bytes of one of the others."""

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.covered + self.others

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.covered_bytes + self.other_bytes

    @property
    def bits(self) -> float:
        """Of a parameter, on average."""
        return 8 * self.bytes / max(1, self.parameters)

    @property
    def formula(self) -> str:
        """What the bytes are made of."""
        others = f"{number(self.others)} parameters × {self.each} bytes"
        if not self.covered:
            return others
        return f"{number(self.covered)} in {self.format} of {self.covered_bytes / self.covered:.5g} bytes + {others}"


def held(tensors: Iterable[Tensors], recipe: Recipe | None, each: int) -> Held:
    """Return what tensors take that are held by a recipe.

    Args:
        recipe: None for none.
        each: bytes of an element that is not quantised.
    """
    covered = covered_bytes = others = other_bytes = 0
    for tensor in tensors:
        if recipe is not None and is_covered(tensor, recipe):
            covered += tensor.elements
            covered_bytes += tensor.count * stored_bytes(recipe, tensor.shape, each)
        else:
            others += tensor.elements
            other_bytes += tensor.elements * (_FLOAT32 if tensor.always_float32 else each)
    return Held(None if recipe is None else recipe.format, covered, covered_bytes, others, other_bytes, each)


def unquantised(parameters: int, each: int) -> Held:
    """Return what parameters of unknown shapes take."""
    return Held(None, 0, 0, parameters, parameters * each, each)


def covered_parameters(tensors: Iterable[Tensors], recipe: Recipe) -> Parameters:
    """Return the parameters that a recipe covers."""
    return counted(tensor for tensor in tensors if is_covered(tensor, recipe))


def is_covered(tensor: Tensors, recipe: Recipe) -> bool:
    """Whether a recipe covers a tensor, and with it all of its kind in the layer."""
    return recipe.layers.cover(tensor.name, len(tensor.shape))
