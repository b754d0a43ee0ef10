"""Whether the parts of a matrix that ranks hold can be quantised each by itself, to what the whole matrix would be."""

from __future__ import annotations

from miles.precision.recipe import FP8_BLOCK, MX_GROUP, Recipe

ROWS, COLUMNS = 0, 1
"""Dimensions of a matrix (O, I): outputs, and inputs, which are rows and columns of its weight."""


def scale_unit(recipe: Recipe) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None for a format with one scale more for the whole matrix."""
    match recipe.format:
        case "fp8_block":
            return FP8_BLOCK, FP8_BLOCK
        case "mxfp8":
            return 1, MX_GROUP
        case "int4":
            return 1, recipe.group_size
    return None


def cut_fault(recipe: Recipe, dimension: int, size: int) -> str | None:
    """What is wrong when ranks hold parts of a matrix, each `size` long in a dimension; None when nothing is.

    Inputs are in groups along the columns, so they are cut as they should be where the columns are.
    """
    unit = scale_unit(recipe)
    if unit is None:
        return f"{recipe.format} has a scale for the whole of a matrix, which no rank holds"
    if size % unit[dimension] == 0:
        return None
    kind = ("rows", "columns")[dimension]
    return f"ranks hold {size} of its {kind}, which {recipe.format} scales {unit[dimension]} at a time"
