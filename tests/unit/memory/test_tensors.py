"""Names, shapes and bytes of a model's tensors by its config.json, against those that transformers has."""

from __future__ import annotations

import json
import math
import pathlib

import pytest
import torch
from megatron_models import FAMILIES, config_of

from miles.memory.held import held
from miles.memory.model import ModelShape, shape_of
from miles.memory.tensors import model_tensors
from miles.precision.layers import QuantisedLayers
from miles.precision.recipe import Recipe
from miles.precision.tensors import QuantisedTensors
from miles.weights.naming.model_tensors import read_model_tensors

NAMED_OTHERWISE = ("MiniMax-M2", "Llama 4")
RECIPES = (
    Recipe(format="fp8_block"),
    Recipe(format="int4", group_size=8),
    Recipe(format="int4", group_size=8, layers=QuantisedLayers(only=(".experts.",))),
    Recipe(format="int4", group_size=8, layers=QuantisedLayers(high_layers=frozenset({0}), but=("o_proj",))),
)


def named(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    return {
        tensors.name.replace(".experts.0.", f".experts.{number}."): tensors.shape
        for tensors in model_tensors(shape)
        for number in range(tensors.count)
    }


@pytest.mark.parametrize("family", [each for each in FAMILIES if each not in ("Gemma 3n", *NAMED_OTHERWISE)])
def test_tensors_have_their_names_shapes_and_bytes(tmp_path: pathlib.Path, family: str) -> None:
    config_of(family).save_pretrained(tmp_path)
    shape, real = shape_of(json.loads((tmp_path / "config.json").read_text())), read_model_tensors(tmp_path)
    assert shape is not None
    checkpoint = real.conversion.checkpoint_shapes(real.module)
    assert named(shape) == {name.removesuffix(".weight"): size for name, size in checkpoint.items()}
    for recipe in RECIPES:
        quantised, exported = QuantisedTensors(recipe), 0
        for name, size in checkpoint.items():
            dtype = real.exported_dtype(name, torch.bfloat16, torch.bfloat16)
            exported += sum(math.prod(part) * kind.itemsize for _, kind, part in quantised.layout(name, dtype, size))
        found = held(model_tensors(shape), recipe, 2)
        assert found.bytes == exported
        assert found.covered > 0 or (recipe.layers.only and not shape.experts)
