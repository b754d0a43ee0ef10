"""A model's tensors by name: which are quantised, what they become, and that they come back."""

from __future__ import annotations

import pytest
import torch
from format_cases import FORMATS, GROUP, random_matrix, same

from miles.precision.layers import QuantisedLayers
from miles.precision.recipe import FormatName, Recipe
from miles.precision.registry import weight_format
from miles.precision.tensors import QuantisedTensors, restored
from miles.weights.base import WeightsRefused
from miles.weights.export_format import formatted, formatted_layout

NAMES: tuple[FormatName, ...] = ("fp8_block", "int4", "mxfp8", "nvfp4")
EXPERTS = "model.layers.1.mlp.experts."


def recipe(name: FormatName, **layers: tuple[str, ...]) -> Recipe:
    return Recipe(format=name, layers=QuantisedLayers(**layers), group_size=GROUP)


def model() -> dict[str, torch.Tensor]:
    return {
        "model.embed_tokens.weight": random_matrix(97, 32),
        "model.layers.0.self_attn.q_proj.weight": random_matrix(48, 32, seed=1),
        "model.layers.0.self_attn.q_proj.bias": random_matrix(1, 48)[0],
        "model.layers.0.input_layernorm.weight": torch.ones(32),
        "model.layers.1.mlp.gate.weight": random_matrix(4, 32, seed=2),
        f"{EXPERTS}gate_up_proj": random_matrix(4, 96, 32, seed=3),
        f"{EXPERTS}down_proj": random_matrix(4, 32, 48, seed=4),
        "lm_head.weight": random_matrix(97, 32, seed=5),
    }


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_tensors_come_back_as_the_trainer_rounds_them(name: FormatName, dtype: torch.dtype) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in model().items()}
    form = QuantisedTensors(recipe(name))
    sent = dict(formatted(form, tensors.items()))
    layout = formatted_layout(form, [(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()])
    assert layout == [(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in sent.items()]
    found = restored(recipe(name), shapes(tensors), sent, dtype)
    assert found.keys() == tensors.keys()
    codec = weight_format(recipe(name))
    covered = {"model.layers.0.self_attn.q_proj.weight", f"{EXPERTS}gate_up_proj", f"{EXPERTS}down_proj"}
    for key, tensor in tensors.items():
        matrices = tensor.view(4, 2, 48, 32) if key == f"{EXPERTS}gate_up_proj" else tensor
        assert same(found[key], codec.rounded(matrices).view(tensor.shape) if key in covered else tensor)
    assert not covered & {key for key in covered if same(found[key], tensors[key])}


@pytest.mark.parametrize("name", NAMES)
def test_experts_are_quantised_alike_together_and_each_by_itself(name: FormatName) -> None:
    form = QuantisedTensors(recipe(name))
    together = model()[f"{EXPERTS}gate_up_proj"]
    found = dict(form.convert(f"{EXPERTS}gate_up_proj", together))
    for expert in range(4):
        for number, matrix in enumerate(("gate_proj", "up_proj")):
            own = f"{EXPERTS}{expert}.{matrix}.weight"
            for part, tensor in form.convert(own, together[expert].chunk(2)[number]):
                suffix = part.removeprefix(own)
                joint = found[f"{EXPERTS}gate_up_proj{suffix}"]
                assert same(tensor, joint if suffix == "_shape" else joint[expert, number])


def test_every_fault_is_named_before_anything_is_dequantised() -> None:
    tensors = model()
    sent = dict(formatted(QuantisedTensors(recipe("fp8_block")), tensors.items()))
    query = "model.layers.0.self_attn.q_proj.weight"
    del sent[f"{query}_scale_inv"]
    sent[f"{EXPERTS}down_proj"] = sent[f"{EXPERTS}down_proj"].float()
    sent[f"{EXPERTS}gate_up_proj_scale_inv"] = sent[f"{EXPERTS}gate_up_proj_scale_inv"][:3]
    with pytest.raises(WeightsRefused) as refused:
        restored(recipe("fp8_block"), shapes(tensors), sent, torch.float32)
    text = str(refused.value)
    assert text.startswith("fp8_block weights do not fit: ")
    assert f"{query}_scale_inv is missing" in text
    assert f"{EXPERTS}down_proj is torch.float32 (4, 32, 48) instead of torch.float8_e4m3fn (4, 32, 48)" in text
    assert (
        f"{EXPERTS}gate_up_proj_scale_inv is torch.float32 (3, 2, 1, 1) instead of torch.float32 (4, 2, 1, 1)" in text
    )


def test_a_long_list_of_faults_is_cut() -> None:
    expected = {f"model.layers.{number}.mlp.up_proj.weight": (48, 32) for number in range(7)}
    with pytest.raises(WeightsRefused, match=r"5\.mlp|layers\.2.* is missing; and 9 more$"):
        restored(recipe("fp8_block"), expected, {}, torch.float32)


def test_a_matrix_that_a_format_cannot_hold_is_named() -> None:
    with pytest.raises(ValueError, match=r"up_proj.weight cannot be int4: its rows of 24 .* choose another group size"):
        QuantisedTensors(recipe("int4")).layout("model.layers.0.mlp.up_proj.weight", torch.float32, (48, 24))


def test_integers_and_what_a_recipe_leaves_out_stay_as_they_are() -> None:
    form = QuantisedTensors(recipe("int4", only=(".experts.",)))
    counts = torch.arange(64).view(4, 16)
    assert list(form.convert("model.layers.0.mlp.up_proj.weight", counts)) == [
        ("model.layers.0.mlp.up_proj.weight", counts)
    ]
    query = random_matrix(48, 32)
    assert [part for part, _ in form.convert("model.layers.0.self_attn.q_proj.weight", query)] == [
        "model.layers.0.self_attn.q_proj.weight"
    ]
    assert len(list(form.convert(f"{EXPERTS}3.up_proj.weight", query))) == 3


def test_the_formats_of_tests_are_all_there_are() -> None:
    assert {name.partition(",")[0] for name in FORMATS} == set(NAMES)
