from __future__ import annotations

import pytest
import torch

from miles.precision.recipe import FormatName, Recipe
from miles.precision.registry import weight_format
from miles.precision.shards import COLUMNS, ROWS, cut_fault

FORMATS: tuple[FormatName, ...] = ("fp8_block", "int4", "mxfp8")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dimension", [ROWS, COLUMNS])
@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
def test_parts_without_a_fault_are_rounded_as_the_whole(name: FormatName, dimension: int, size: int) -> None:
    recipe = Recipe(format=name, group_size=64)
    torch.manual_seed(0)
    whole = torch.randn(512, 512) * torch.logspace(-3, 0, 512) * torch.logspace(-2, 0, 512)[:, None]
    codec = weight_format(recipe)
    fault = cut_fault(recipe, dimension, size)
    parts = torch.split(whole, size, dimension)
    if any(codec.why_not(tuple(part.shape)) for part in parts):
        assert fault is not None
        return
    together = torch.cat([codec.rounded(part) for part in parts], dimension)
    assert together.equal(codec.rounded(whole)) == (fault is None)


def test_a_fault_says_what_is_cut() -> None:
    assert cut_fault(Recipe(format="fp8_block"), ROWS, 192) == (
        "ranks hold 192 of its rows, which fp8_block scales 128 at a time"
    )
    assert "no rank holds" in str(cut_fault(Recipe(format="nvfp4"), COLUMNS, 256))
