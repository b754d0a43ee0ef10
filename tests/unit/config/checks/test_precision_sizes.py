"""Which matrices of a published model a recipe covers, and which layouts cut numbers that share a scale."""

from __future__ import annotations

import json
import pathlib

import pytest

from miles.config.checks.precision_sizes import coverage, cut_problem, narrow, parted, split_experts, undivided
from miles.memory.model import ModelShape, shape_of
from miles.precision.layers import QuantisedLayers
from miles.precision.recipe import Recipe

CONFIGS = pathlib.Path(__file__).parents[3] / "launch_scripts" / "configs"
EXPERTS = QuantisedLayers(only=(".experts.",))


def model(name: str) -> ModelShape:
    shape = shape_of(json.loads((CONFIGS / f"{name}.json").read_text()))
    assert shape is not None
    return shape


LATENT = model("DeepSeek-R1-bf16")


def test_int4_of_experts_covers_most_of_a_large_mixture() -> None:
    found = coverage(Recipe(format="int4", layers=EXPERTS), model("Qwen3-30B-A3B"))
    assert found.covered == 48 * 128 * 3 * 2048 * 768
    assert 0.96 < found.covered / found.matrices < 0.98


@pytest.mark.parametrize(
    ("recipe", "tensor", "expert_tensor", "problem"),
    [
        (Recipe(format="fp8_block"), 8, 1, None),
        (Recipe(format="fp8_block"), 32, 1, ("tensor_model_parallel_size", "mlp.gate_proj, ranks hold 576 of its")),
        (Recipe(format="fp8_block"), 8, 32, ("expert_tensor_parallel_size", "gate_proj, ranks hold 64 of its rows")),
        (Recipe(format="int4", layers=EXPERTS), 32, 1, None),
        (Recipe(format="int4", layers=EXPERTS, group_size=32), 1, 32, None),
        (Recipe(format="int4", layers=EXPERTS), 1, 32, ("expert_tensor_parallel_size", "down_proj, ranks hold 64 of")),
        (Recipe(format="nvfp4"), 2, 1, ("tensor_model_parallel_size", "nvfp4 has a scale for the whole of a matrix")),
    ],
)
def test_layouts_that_cut_scales_are_named(
    recipe: Recipe, tensor: int, expert_tensor: int, problem: tuple[str, str] | None
) -> None:
    found = cut_problem(recipe, model("DeepSeek-R1-bf16"), tensor=tensor, expert_tensor=expert_tensor)
    assert (found is None) == (problem is None)
    if found is not None and problem is not None:
        assert found[0] == problem[0]
        assert problem[1] in found[1]


def test_kernels_of_fp8_take_multiples_of_16() -> None:
    shape = model("Qwen3-30B-A3B")
    assert narrow(Recipe(format="fp8_block"), shape, tensor=4, expert_tensor=1) is None
    key, problem = narrow(Recipe(format="fp8_block"), shape, tensor=4, expert_tensor=96) or ("", "")
    assert key == "expert_tensor_parallel_size"
    assert "model.layers.0.mlp.experts.0.gate_proj is 8 x 2048 on a rank" in problem


@pytest.mark.parametrize(
    "ignored",
    [
        ("lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"),
        ("lm_head", *(f"model.layers.{n}.{each}" for n in range(94) for each in ("mlp.gate", "input_layernorm"))),
        ("gate", "e_score_correction_bias", "lm_head"),
        (r"re:.*layers\.(3|60)\..*", r"re:.*layers\.[4-9]\..*experts\.\d+\..*"),
        tuple(f"model.layers.7.mlp.experts.{e}.{each}_proj" for e in range(256) for each in ("gate", "up", "down")),
    ],
    ids=["Kimi K2 Thinking", "Qwen3 FP8", "MiniMax M2", "layers", "every expert"],
)
def test_lists_of_published_models_name_all_experts_of_a_layer_or_none(ignored: tuple[str, ...]) -> None:
    assert split_experts(Recipe(format="fp8_block", layers=QuantisedLayers(ignored=ignored)), LATENT) is None


@pytest.mark.parametrize(
    "entries",
    [
        (r"re:.*experts\.2[0-4]\d\..*",),
        (r"re:.*layers\.60\.mlp\.experts\.[4-6]\d\..*",),
        (r"re:.*layers\.2[4-6]\.mlp\.experts\.[4-6]\d\..*",),
        tuple(f"model.layers.7.mlp.experts.{e}" for e in range(255)),
        ("model.layers.3", "model.layers.60", r"re:.*experts\.2[0-4]\d\..*"),
    ],
)
def test_entries_that_name_some_experts_of_a_layer_are_found(entries: tuple[str, ...]) -> None:
    recipe = Recipe(format="fp8_block", layers=QuantisedLayers(ignored=entries))
    assert "which is quantised, and model.layers." in (split_experts(recipe, LATENT) or "")


def test_rows_are_whole_numbers_of_groups() -> None:
    shape = model("Qwen3-30B-A3B")
    assert undivided(Recipe(format="int4", layers=EXPERTS), shape) is None
    found = undivided(Recipe(format="int4", layers=EXPERTS, group_size=512), shape)
    assert found is not None
    assert found.name == "model.layers.0.mlp.experts.0.down_proj"
    assert undivided(Recipe(format="fp8_block", group_size=512), shape) is None


def test_what_megatron_multiplies_at_once_is_covered_at_once() -> None:
    plain, latent = model("Qwen3-4B"), model("DeepSeek-R1-bf16")
    only_queries = Recipe(format="fp8_block", layers=QuantisedLayers(but=("k_proj", "v_proj")))
    assert parted(only_queries, plain) == ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")
    assert parted(Recipe(format="fp8_block", layers=QuantisedLayers(but=("kv_b_proj",))), latent) is None
    assert parted(Recipe(format="fp8_block", layers=QuantisedLayers(high_layers=frozenset({0}))), plain) is None
