"""The tensors of quantised folders, read as what they stand for."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
from safetensors.torch import save_file

from miles.precision.quantization_config import UnknownQuantisation, quantization_config
from miles.precision.recipe import Recipe
from miles.precision.registry import weight_format
from miles.precision.tensors import QuantisedTensors
from miles.weights.base import WeightsRefused
from miles.weights.hf_folder.plain_tensors import PlainTensors

FP8, INT4 = Recipe(format="fp8_block"), Recipe(format="int4", group_size=32)
RAGGED, NORM, HEAD = "layers.0.q_proj.weight", "layers.0.norm.weight", "lm_head.weight"


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {RAGGED: (200, 160), NORM: (160,), HEAD: (40, 160), "layers.0.experts.down_proj": (3, 130, 32)}
    return {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def write(folder: pathlib.Path, recipe: Recipe | None, tensors: dict[str, torch.Tensor]) -> pathlib.Path:
    """Tensors in two files, the parts of a matrix apart from each other."""
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"model-{number}.safetensors")
    stated = {} if recipe is None else {"quantization_config": quantization_config(recipe, ["lm_head"])}
    (folder / "config.json").write_text(json.dumps(stated))
    return folder


def quantised(recipe: Recipe) -> dict[str, torch.Tensor]:
    made = QuantisedTensors(recipe)
    return {name: part for each in weights().items() for name, part in made.convert(*each)}


@pytest.mark.parametrize("recipe", [FP8, INT4], ids=["fp8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_are_what_their_parts_stand_for(tmp_path: pathlib.Path, recipe: Recipe, dtype: torch.dtype) -> None:
    found, before = PlainTensors(write(tmp_path, recipe, quantised(recipe)), dtype), weights()
    assert set(found) == before.keys()
    assert len(found) == len(before)
    codec = weight_format(recipe)
    for name, tensor in before.items():
        covered = recipe.layers.cover(name, tensor.dim())
        assert found.is_quantised(name) is covered is (name not in (NORM, HEAD))
        expected = codec.dequantise(codec.quantise(tensor), dtype) if covered else tensor
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)


def test_a_folder_that_is_not_quantised_is_as_it_is(tmp_path: pathlib.Path) -> None:
    found = PlainTensors(write(tmp_path, None, weights()), torch.float32)
    assert found.recipe is None
    assert all(torch.equal(found[name], tensor) for name, tensor in weights().items())
    assert "other" not in found
    with pytest.raises(KeyError):
        found["other"]


@pytest.mark.parametrize(
    ("recipe", "lost", "expected"),
    [
        (FP8, "_scale_inv", f"lacks parts of quantised matrices: scales of {RAGGED}"),
        (FP8, "", f"lacks parts of quantised matrices: {RAGGED}$"),
        (INT4, "_scale", f"lacks parts of quantised matrices: {RAGGED}_scale$"),
        (INT4, "_shape", f"lacks parts of quantised matrices: {RAGGED}_shape$"),
    ],
)
def test_missing_parts_are_named(tmp_path: pathlib.Path, recipe: Recipe, lost: str, expected: str) -> None:
    tensors = quantised(recipe)
    del tensors[RAGGED + lost]
    with pytest.raises(WeightsRefused, match=expected):
        PlainTensors(write(tmp_path, recipe, tensors), torch.float32)


@pytest.mark.parametrize(
    ("stated", "stored", "expected"),
    [
        (None, FP8, "_scale_inv and 1 more, of a quantised matrix, and says no quantization_config"),
        (None, INT4, "_packed and 1 more, of a quantised matrix, and says no quantization_config"),
        (FP8, INT4, "_packed and 1 more, of a quantised matrix, and says fp8_block without such parts"),
        (INT4, FP8, "_scale_inv and 1 more, of a quantised matrix, and says int4 without such parts"),
    ],
)
def test_parts_that_config_json_does_not_speak_of_are_refused(
    tmp_path: pathlib.Path, stated: Recipe | None, stored: Recipe, expected: str
) -> None:
    with pytest.raises(WeightsRefused, match=f"holds layers.0.*{expected}"):
        PlainTensors(write(tmp_path, stated, quantised(stored)), torch.float32)


@pytest.mark.parametrize("part", ["_g_idx", "_zero_point"])
def test_parts_by_which_int4_means_other_numbers_are_refused(tmp_path: pathlib.Path, part: str) -> None:
    tensors = quantised(INT4) | {RAGGED + part: torch.zeros(160, dtype=torch.int32)}
    with pytest.raises(WeightsRefused, match=f"holds {RAGGED}{part}, of a quantised matrix, and says int4 without"):
        PlainTensors(write(tmp_path, INT4, tensors), torch.float32)


def test_fp8_values_without_any_scales_are_refused(tmp_path: pathlib.Path) -> None:
    tensors = {name: part for name, part in quantised(FP8).items() if not name.endswith("_scale_inv")}
    with pytest.raises(WeightsRefused, match=f"scales of .*{RAGGED}"):
        PlainTensors(write(tmp_path, None, tensors), torch.float32)


@pytest.mark.parametrize(
    ("recipe", "part", "expected"),
    [
        (FP8, "_scale_inv", r"_scale_inv has shape \(1, 2\) instead of \(2, 2\)"),
        (INT4, "_scale", r"_scale has shape \(1, 5\) instead of \(200, 5\)"),
        (INT4, "_packed", r"_packed has shape \(1, 20\) instead of \(200, 20\)"),
    ],
)
def test_parts_of_other_shapes_are_refused(tmp_path: pathlib.Path, recipe: Recipe, part: str, expected: str) -> None:
    tensors = quantised(recipe)
    tensors[RAGGED + part] = tensors[RAGGED + part][:1].contiguous()
    found = PlainTensors(write(tmp_path, recipe, tensors), torch.float32)
    with pytest.raises(WeightsRefused, match=expected):
        found[RAGGED]


def test_scales_and_shapes_of_other_types_are_read(tmp_path: pathlib.Path) -> None:
    tensors = quantised(INT4)
    tensors |= {name: t.int() for name, t in tensors.items() if name.endswith("_shape")}
    tensors |= {name: t.float() for name, t in tensors.items() if name.endswith("_scale")}
    found = PlainTensors(write(tmp_path, INT4, tensors), torch.bfloat16)
    codec = weight_format(INT4)
    assert torch.equal(found[RAGGED], codec.dequantise(codec.quantise(weights()[RAGGED]), torch.bfloat16))


def test_an_unknown_quantisation_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UnknownQuantisation, match="quantised by gptq"):
        PlainTensors(tmp_path, torch.float32)
