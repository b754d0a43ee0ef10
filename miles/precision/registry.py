"""The implementation of a recipe's format."""

from __future__ import annotations

from miles.precision.base import WeightFormat
from miles.precision.fp8_block import Fp8Block
from miles.precision.int4 import Int4
from miles.precision.mxfp8 import MxFp8
from miles.precision.nvfp4 import NvFp4
from miles.precision.recipe import Recipe


def weight_format(recipe: Recipe) -> WeightFormat:
    """The format's quantiser."""
    match recipe.format:
        case "fp8_block":
            return Fp8Block(power_of_two_scales=recipe.power_of_two_scales)
        case "int4":
            return Int4(recipe.group_size)
        case "mxfp8":
            return MxFp8()
        case "nvfp4":
            return NvFp4()
