from __future__ import annotations

import dataclasses
import pathlib

import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig

from miles.precision.layers import QuantisedLayers
from miles.precision.recipe import Recipe
from miles.precision.tensors import QuantisedTensors
from miles.services.rollout.engines.sglang.weights.layout import ModelLayout, parts_of, read_layout
from miles.weights.naming.contract import WeightContract

CHECKPOINT = WeightContract(form="checkpoint")


@pytest.mark.parametrize("tied", [True, False])
def test_tied_parameters_are_known_by_every_name(tmp_path: pathlib.Path, tied: bool) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied).save_pretrained(tmp_path)
    layout = read_layout(str(tmp_path), CHECKPOINT)
    assert dict(layout.aliases) == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    assert ("lm_head.weight" in layout.shapes) is not tied


def test_a_model_that_sglang_would_build_otherwise_is_refused(tmp_path: pathlib.Path) -> None:
    Qwen3MoeConfig(num_hidden_layers=2, mlp_only_layers=[0]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gives every layer of a qwen3_moe experts"):
        read_layout(str(tmp_path), CHECKPOINT)


def test_weights_of_another_form_or_type_are_refused_with_what_was_wanted() -> None:
    layout = ModelLayout({"a": (2, 2), "b": (3,)}, 8, 8)
    good = {"a": torch.zeros(2, 2), "b": torch.zeros(3)}
    layout.refuse_misfits(good, torch.bfloat16)
    layout.refuse_misfits({name: tensor.bfloat16() for name, tensor in good.items()}, torch.bfloat16)
    with pytest.raises(ValueError, match=r"b \(3,\) is missing; c \(1,\) is none of .* in the checkpoint form"):
        layout.refuse_misfits({"a": good["a"], "c": torch.zeros(1)}, torch.float32)
    with pytest.raises(ValueError, match=r"b has shape \(4,\) instead of \(3,\)"):
        layout.refuse_misfits(good | {"b": torch.zeros(4)}, torch.float32)
    with pytest.raises(ValueError, match=r"a is torch\.float16 instead of torch\.bfloat16"):
        layout.refuse_misfits({name: tensor.half() for name, tensor in good.items()}, torch.bfloat16)


@pytest.mark.parametrize("recipe", [Recipe(format="fp8_block"), Recipe(format="int4", group_size=32)])
def test_parts_of_quantised_matrices_are_taken_in_their_own_types_alone(recipe: Recipe) -> None:
    kept = QuantisedLayers(but=("o_proj",))
    recipe = dataclasses.replace(recipe, layers=kept)
    shapes = {"l.q_proj.weight": (160, 64), "l.o_proj.weight": (64, 64), "l.norm.weight": (64,)}
    layout = ModelLayout(shapes, 8, 8, parts=parts_of(recipe, shapes, torch.bfloat16))
    published = QuantisedTensors(recipe)
    plain = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    good = {part: tensor for name, whole in plain.items() for part, tensor in published.convert(name, whole)}
    layout.refuse_misfits(good, torch.bfloat16)
    with pytest.raises(ValueError, match=rf"the checkpoint form, quantised to {recipe.format}"):
        layout.refuse_misfits(plain, torch.bfloat16)
    *_, scale = (part for part in good if "scale" in part)
    with pytest.raises(ValueError, match=rf"{scale} is torch\.float64 instead of {good[scale].dtype}"):
        layout.refuse_misfits(good | {scale: good[scale].double()}, torch.bfloat16)
    with pytest.raises(ValueError, match=rf"{scale} .* is missing"):
        layout.refuse_misfits({name: tensor for name, tensor in good.items() if name != scale}, torch.bfloat16)
    with pytest.raises(ValueError, match=r"o_proj.weight is torch\.float16 instead of torch\.bfloat16"):
        layout.refuse_misfits(good | {"l.o_proj.weight": plain["l.o_proj.weight"].half()}, torch.bfloat16)
