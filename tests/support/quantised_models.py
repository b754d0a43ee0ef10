"""Tiny models in Hugging Face folders of FP8 and INT4."""

from __future__ import annotations

import json
import pathlib

import torch
from megatron_models import write_model

from miles.precision.layers import QuantisedLayers
from miles.precision.recipe import Recipe
from miles.services.trainer.checkpoint.quantised_model import write_quantised_model

RECIPES = {
    "fp8": Recipe(format="fp8_block"),
    "fp8, powers of two": Recipe(format="fp8_block", power_of_two_scales=True),
    "int4": Recipe(format="int4", group_size=8),
    "int4, experts": Recipe(format="int4", group_size=8, layers=QuantisedLayers(only=(".experts.",))),
}
"""The sizes of tiny models are multiples of 8, and not of more."""


def write_quantised(
    family: str, folder: pathlib.Path, recipe: Recipe, dtype: torch.dtype = torch.float32
) -> pathlib.Path:
    """A model of a family, quantised from `dtype`; the one that it is from is beside it, with `-source` to its name."""
    source = folder.with_name(f"{folder.name}-source")
    write_quantised_model(write_model(family, source), folder, recipe, dtype)
    return folder


def change_config(folder: pathlib.Path, **changes: object) -> None:
    """Change entries of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
