"""The implementation of a recipe's format."""

from __future__ import annotations

from miles.precision.base import WeightFormat
from miles.precision.fp8_block import Fp8Block
from miles.precision.int4 import Int4
from miles.precision.recipe import Recipe


def weight_format(recipe: Recipe) -> WeightFormat:
    """The format. Raises ValueError for one that is not there."""
    match recipe.format:
        case "fp8_block":
            return Fp8Block(power_of_two_scales=recipe.power_of_two_scales)
        case "int4":
            return Int4(recipe.group_size)
    raise ValueError(f"there is no format {recipe.format!r}")
