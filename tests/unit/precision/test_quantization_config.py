"""What config.json says of a folder's weights, as a recipe and back."""

from __future__ import annotations

from typing import Any

import pytest

from miles.precision.quantization_config import UnknownQuantisation, quantization_config, recipe_of
from miles.precision.recipe import Recipe

DEEPSEEK_V3 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
"""As in deepseek-ai/DeepSeek-V3."""
KIMI_K2_THINKING = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}
"""As in moonshotai/Kimi-K2-Thinking."""


def recipe(stated: dict[str, Any]) -> Recipe:
    found = recipe_of({"quantization_config": stated})
    assert found is not None
    return found


def changed(stated: dict[str, Any], **weights: Any) -> dict[str, Any]:
    group = stated["config_groups"]["group_0"]
    return regrouped(stated, weights={**group["weights"], **weights})


def regrouped(stated: dict[str, Any], **group: Any) -> dict[str, Any]:
    return {**stated, "config_groups": {"group_0": {**stated["config_groups"]["group_0"], **group}}}


NO_BITS = {"type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def test_a_folder_without_quantised_weights_has_no_recipe() -> None:
    assert recipe_of({}) is None
    assert recipe_of({"quantization_config": None}) is None


def test_deepseek_has_fp8_blocks_in_all_matrices() -> None:
    found = recipe(DEEPSEEK_V3)
    assert (found.format, found.power_of_two_scales) == ("fp8_block", False)
    assert found.layers.cover("model.layers.3.mlp.experts.17.up_proj.weight", 2)
    assert found.layers.cover("model.layers.3.self_attn.kv_b_proj.weight", 2)
    assert not found.layers.cover("model.layers.3.mlp.gate.weight", 2)
    assert recipe({**DEEPSEEK_V3, "scale_fmt": "ue8m0"}).power_of_two_scales


def test_kimi_has_int4_groups_in_routed_experts_alone() -> None:
    found = recipe(KIMI_K2_THINKING)
    assert (found.format, found.group_size, found.rounds_inputs) == ("int4", 32, False)
    assert found.layers.cover("model.layers.3.mlp.experts.gate_up_proj", 3)
    assert found.layers.cover("model.layers.3.mlp.experts.17.up_proj.weight", 2)
    assert not found.layers.cover("model.layers.0.mlp.up_proj.weight", 2)
    assert not found.layers.cover("model.layers.3.mlp.shared_experts.up_proj.weight", 2)
    assert not found.layers.cover("model.layers.3.self_attn.o_proj.weight", 2)


@pytest.mark.parametrize(
    "original",
    [
        Recipe(format="fp8_block"),
        Recipe(format="fp8_block", power_of_two_scales=True),
        Recipe(format="int4", group_size=32),
    ],
)
def test_what_is_written_is_read_as_the_same_recipe(original: Recipe) -> None:
    kept = ["model.layers.0.mlp.down_proj", "lm_head"]
    found = recipe(quantization_config(original, kept))
    assert (found.format, found.power_of_two_scales) == (original.format, original.power_of_two_scales)
    assert original.format != "int4" or found.group_size == original.group_size
    assert found.layers.cover("model.layers.1.mlp.down_proj.weight", 2)
    assert not found.layers.cover("model.layers.0.mlp.down_proj.weight", 2)
    assert found.layers.cover("model.layers.10.mlp.down_proj.weight", 2)


@pytest.mark.parametrize(
    ("stated", "problem"),
    [
        ({"quant_method": "awq"}, "quantised by awq"),
        ({**DEEPSEEK_V3, "weight_block_size": [64, 64]}, r"blocks of \[64, 64\]"),
        ({"quant_method": "fp8"}, "blocks of no size"),
        ({**DEEPSEEK_V3, "activation_scheme": "static"}, "static scales of inputs"),
        ({**DEEPSEEK_V3, "fmt": "e5m2"}, "e5m2 values"),
        ({**KIMI_K2_THINKING, "format": "int-quantized"}, "int-quantized"),
        ({**KIMI_K2_THINKING, "config_groups": {}}, "0 groups"),
        (changed(KIMI_K2_THINKING, num_bits=8), "'num_bits': 8"),
        (changed(KIMI_K2_THINKING, symmetric=False), "'symmetric': False"),
        (changed(KIMI_K2_THINKING, strategy="channel", group_size=None), "'strategy': 'channel'"),
        (changed(KIMI_K2_THINKING, actorder="group"), "actorder group, by which weight_g_idx says what columns"),
        (changed(KIMI_K2_THINKING, actorder="dynamic"), "actorder dynamic, by which weight_g_idx"),
        (changed(KIMI_K2_THINKING, actorder=True), "actorder True, by which weight_g_idx"),
        (regrouped(KIMI_K2_THINKING, weights=NO_BITS), "'num_bits': 8"),
        (regrouped(KIMI_K2_THINKING, input_activations={"num_bits": 8}), "input_activations that are quantised too"),
        (regrouped(KIMI_K2_THINKING, output_activations={"num_bits": 8}), "output_activations that are quantised"),
        (regrouped(KIMI_K2_THINKING, targets=["re:.*experts.*"]), r"the targets \['re:\.\*experts\.\*'\]; only all"),
    ],
)
def test_other_formats_are_refused_by_what_they_are(stated: dict[str, Any], problem: str) -> None:
    with pytest.raises(UnknownQuantisation, match=problem):
        recipe_of({"quantization_config": stated})


@pytest.mark.parametrize("order", [None, False, "static", "weight", "Weight"])
def test_an_order_of_rounding_leaves_groups_as_they_are(order: Any) -> None:
    assert recipe(changed(KIMI_K2_THINKING, actorder=order)) == recipe(KIMI_K2_THINKING)


def test_all_linear_layers_are_meant_where_targets_are_missing() -> None:
    group = {"weights": KIMI_K2_THINKING["config_groups"]["group_0"]["weights"]}  # type: ignore[index]
    assert recipe({**KIMI_K2_THINKING, "config_groups": {"group_0": group}}) == recipe(KIMI_K2_THINKING)


def test_the_older_name_says_the_same() -> None:
    assert recipe_of({"compression_config": KIMI_K2_THINKING}) == recipe(KIMI_K2_THINKING)
    assert recipe_of({"quantization_config": None, "compression_config": KIMI_K2_THINKING}) == recipe(KIMI_K2_THINKING)
    assert recipe_of({"quantization_config": DEEPSEEK_V3, "compression_config": {}}) == recipe(DEEPSEEK_V3)
    with pytest.raises(UnknownQuantisation, match="int-quantized"):
        recipe_of({"compression_config": {**KIMI_K2_THINKING, "format": "int-quantized"}})


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_formats_that_folders_do_not_have_are_not_written(name: Any) -> None:
    with pytest.raises(ValueError, match=f"do not have weights in {name}"):
        quantization_config(Recipe(format=name), [])
