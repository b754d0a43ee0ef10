"""Bytes of a matrix in a format, from its shape alone: `WeightFormat.parts` added up, without PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from miles.precision.recipe import FP8_BLOCK, MX_GROUP, NV_GROUP, Recipe

_FLOAT32, _SHAPE = 4, 2 * 8


def stored_bytes(recipe: Recipe, shape: Sequence[int], each: int) -> int:
    """Bytes of one matrix (..., O, I) that a recipe covers, with its scales.

    Args:
        each: bytes of an element before it is quantised, which INT4 keeps its scales in.

    Of a shape that the format cannot hold (`why_not`), groups at the ends of rows count as whole ones.
    """
    *leading, outputs, inputs = shape
    matrices = math.prod(leading)
    match recipe.format:
        case "fp8_block":
            blocks = -(-outputs // FP8_BLOCK) * -(-inputs // FP8_BLOCK)
            return matrices * (outputs * inputs + blocks * _FLOAT32)
        case "int4":
            groups = outputs * -(-inputs // recipe.group_size)
            return matrices * (outputs * inputs // 2 + groups * each) + _SHAPE
        case "mxfp8":
            return matrices * outputs * (inputs + -(-inputs // MX_GROUP))
        case "nvfp4":
            return matrices * (outputs * (inputs // 2 + -(-inputs // NV_GROUP)) + _FLOAT32)
