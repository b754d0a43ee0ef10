"""Bytes by shape against the layouts of the formats."""

from __future__ import annotations

import math

import pytest
import torch

from miles.precision.recipe import Recipe
from miles.precision.registry import weight_format
from miles.precision.sizes import stored_bytes

SHAPES = [(128, 128), (576, 7168), (1, 256), (130, 384), (8, 3, 64, 128), (4, 200, 640)]
"""Whole and partial blocks, and matrices of experts in one tensor."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(format="fp8_block"),
        Recipe(format="fp8_block", power_of_two_scales=True),
        Recipe(format="int4", group_size=128),
        Recipe(format="int4", group_size=32),
        Recipe(format="mxfp8"),
        Recipe(format="nvfp4"),
    ],
    ids=lambda recipe: f"{recipe.format}-{recipe.group_size}",
)
def test_bytes_are_those_of_the_parts(recipe: Recipe, dtype: torch.dtype) -> None:
    found = weight_format(recipe)
    for shape in SHAPES:
        if found.why_not(shape) is None:
            parts = found.parts(dtype, shape)
            assert stored_bytes(recipe, shape, dtype.itemsize) == sum(
                math.prod(size) * kind.itemsize for _, kind, size in parts
            )
    assert any(found.why_not(shape) is None for shape in SHAPES)


def test_blocks_at_the_edges_have_whole_scales() -> None:
    assert stored_bytes(Recipe(format="fp8_block"), (576, 7168), 2) == 576 * 7168 + 4 * 5 * 56
    assert stored_bytes(Recipe(format="int4", group_size=32), (2048, 7168), 2) == 2048 * (3584 + 2 * 224) + 16
