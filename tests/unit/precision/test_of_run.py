"""The recipes of trainer and engines, by settings and by what the folder says."""

from __future__ import annotations

from typing import Any

import pytest

from miles.config.sections.precision import PrecisionConfig
from miles.precision.of_run import rollout_recipe_of, training_recipe_of
from miles.precision.quantization_config import quantization_config
from miles.precision.recipe import Recipe

PLAIN: dict[str, Any] = {"num_hidden_layers": 6}
FP8_FOLDER = {**PLAIN, "quantization_config": quantization_config(Recipe(format="fp8_block"), ["lm_head"])}
INT4_FOLDER = {
    **PLAIN,
    "quantization_config": quantization_config(Recipe(format="int4", group_size=32), ["model.layers.0.mlp.up_proj"]),
}
BLOCKWISE: dict[str, Any] = {"fp8_format": "e4m3", "fp8_recipe": "blockwise"}


def formats(model: dict[str, Any], **settings: Any) -> tuple[str | None, str | None]:
    section = PrecisionConfig(**settings)
    trainer, engines = training_recipe_of(section, model), rollout_recipe_of(section, model)
    return trainer and trainer.format, engines and engines.format


@pytest.mark.parametrize(
    ("model", "settings", "trainer", "engines"),
    [
        (PLAIN, {}, None, None),
        (PLAIN, BLOCKWISE, "fp8_block", "fp8_block"),
        (PLAIN, {"fp8_format": "e4m3", "fp8_recipe": "mxfp8"}, "mxfp8", "mxfp8"),
        (PLAIN, {"fp4_format": "e2m1"}, "nvfp4", "nvfp4"),
        (PLAIN, {"int4_qat": True}, "int4", "int4"),
        (PLAIN, {**BLOCKWISE, "rollout_weight_format": "as_trained"}, "fp8_block", None),
        (PLAIN, {"rollout_weight_format": "fp8_block"}, None, "fp8_block"),
        (FP8_FOLDER, {}, None, "fp8_block"),
        (FP8_FOLDER, {"rollout_weight_format": "as_trained"}, None, None),
        (FP8_FOLDER, {"rollout_weight_format": "int4"}, None, "int4"),
        (INT4_FOLDER, {}, None, "int4"),
        (INT4_FOLDER, {"int4_qat": True}, "int4", "int4"),
        ({**PLAIN, "quantization_config": {"quant_method": "awq"}}, {}, None, None),
    ],
)
def test_engines_have_the_folders_format_or_else_the_trainers(
    model: dict[str, Any], settings: dict[str, Any], trainer: str | None, engines: str | None
) -> None:
    assert formats(model, **settings) == (trainer, engines)


def test_trainer_and_engines_have_one_recipe_unless_one_is_asked_for_something_else() -> None:
    for model, settings in ((PLAIN, BLOCKWISE), (PLAIN, {"int4_qat": True}), (INT4_FOLDER, {"int4_qat": True})):
        section = PrecisionConfig(**settings)
        assert training_recipe_of(section, model) == rollout_recipe_of(section, model)


def test_a_folder_says_group_size_and_what_is_covered() -> None:
    found = training_recipe_of(PrecisionConfig(int4_qat=True), INT4_FOLDER)
    assert found is not None
    assert found.group_size == 32
    assert not found.layers.cover("model.layers.0.mlp.up_proj.weight", 2)
    assert found.layers.cover("model.layers.1.mlp.up_proj.weight", 2)


def test_settings_say_it_where_the_folder_does_not() -> None:
    settings: dict[str, Any] = {
        "int4_qat": True,
        "int4_layers": (".",),
        "first_last_layers_bf16": True,
        "num_layers_at_end_in_bf16": 2,
        "extra_high_precision_layers_hf": ("o_proj",),
    }
    found = training_recipe_of(PrecisionConfig(**settings), PLAIN)
    assert found is not None
    assert found.group_size == 128
    covered = [number for number in range(6) if found.layers.cover(f"model.layers.{number}.mlp.up_proj.weight", 2)]
    assert covered == [1, 2, 3]
    assert not found.layers.cover("model.layers.2.self_attn.o_proj.weight", 2)
    default = training_recipe_of(PrecisionConfig(int4_qat=True, int4_group_size=64), PLAIN)
    assert default is not None
    assert default.group_size == 64
    assert not default.layers.cover("model.layers.2.mlp.up_proj.weight", 2)
    assert default.layers.cover("model.layers.2.mlp.experts.down_proj", 3)


def test_scales_are_powers_of_two_where_settings_say_so() -> None:
    found = training_recipe_of(PrecisionConfig(**BLOCKWISE, fp8_block_scales="power_of_two"), PLAIN)
    assert found is not None
    assert found.power_of_two_scales
    assert found.rounds_inputs
