"""Flags of public launch scripts against the config.json of the models that they are for."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from config_cases import MINIMAL

from miles.config.checks.architecture.compare import TABLE, architecture_faults, undecided
from miles.config.checks.environment import file_faults
from miles.config.command.flags import parse_command_line
from miles.config.job import examine
from miles.config.notes import notes
from miles.config.schema.catalog import catalog
from miles.config.schema.flat_settings import FlatSettings

MODELS: dict[str, Any] = json.loads(pathlib.Path(__file__).with_name("published_models.json").read_text())
UNSAID = {"DeepSeek-V4-Flash": ["kv_lora_rank"]}
"""Flags about which neither config.json nor transformers says anything."""


def settings_of(folder: pathlib.Path, model: dict[str, Any], **said: Any) -> FlatSettings:
    (folder / "config.json").write_text(json.dumps(model))
    return examine(MINIMAL | said | {"hf_checkpoint": str(folder)}).settings


@pytest.mark.parametrize("name", sorted(MODELS))
def test_flags_of_scripts_agree_with_the_model_that_they_are_for(name: str, tmp_path: pathlib.Path) -> None:
    line = parse_command_line(MODELS[name]["flags"].split())
    assert line.faults == []
    settings = settings_of(tmp_path, MODELS[name]["config"], **line.flat)
    assert [str(fault) for fault in architecture_faults(settings)] == []
    assert [key for key, _ in undecided(settings)] == UNSAID.get(name, [])


def changed(key: str, value: Any) -> Any:
    """Another value of the same kind."""
    meant_too = {"position_embedding_type": "yarn"}.get(key)
    choices = [choice for choice in catalog()[key].choices if choice not in (value, meant_too)]
    if choices:
        return choices[-1]
    if key == "moe_layer_freq":
        return "[1]+[0]*3"
    if key == "window_size":
        return "77,0"
    return not value if isinstance(value, bool) else [1, 2] if isinstance(value, tuple) else value * 3


OF_NO_CONSEQUENCE = {
    "kv_channels": "latent",
    "add_qkv_bias": "latent",
    "moe_router_pre_softmax": "sigmoid",
    "rope_type": "not scaled",
    "mscale": "not scaled",
    "mscale_all_dim": "not scaled",
}


@pytest.mark.parametrize(
    "name", ["Qwen3-30B-A3B", "GLM-4.5", "DeepSeek-V3", "Llama-3.1-8B", "gpt-oss-20b", "MiniMax-M2"]
)
def test_each_flag_that_differs_from_the_model_is_refused(name: str, tmp_path: pathlib.Path) -> None:
    flat = parse_command_line(MODELS[name]["flags"].split()).flat
    right = settings_of(tmp_path, MODELS[name]["config"], **flat)
    for key in (key for key in flat if key in TABLE and key not in OF_NO_CONSEQUENCE):
        wrong = right.changed(**{key: changed(key, getattr(right, key))})
        assert [fault.field for fault in architecture_faults(wrong)] == [key], key


def test_a_fault_shows_both_values_and_where_the_other_one_is(tmp_path: pathlib.Path) -> None:
    settings = settings_of(tmp_path, MODELS["Qwen3-4B"]["config"], num_layers=28, rotary_base=1e4)
    assert [str(fault) for fault in architecture_faults(settings)] == [
        f"num_layers = 28, but num_hidden_layers makes it 36 in {tmp_path}/config.json; "
        "correct it or leave it out, or choose the model's own folder",
        f"rotary_base = 10000.0, but rope_theta makes it 1000000 in {tmp_path}/config.json; "
        "correct it or leave it out, or choose the model's own folder",
    ]
    assert {"num_layers", "rotary_base"} <= {fault.field for fault in file_faults(settings)}


def test_what_config_json_leaves_out_is_as_its_class_in_transformers_has_it(tmp_path: pathlib.Path) -> None:
    shared = {key: value for key, value in MODELS["Qwen3-4B"]["config"].items() if key != "rope_theta"}
    assert list(architecture_faults(settings_of(tmp_path, shared, rotary_base=10_000))) == []
    (fault,) = architecture_faults(settings_of(tmp_path, shared, rotary_base=1_000_000))
    assert fault.problem.startswith("rope_theta makes it 10000.0")


def test_what_nothing_says_is_noted(tmp_path: pathlib.Path) -> None:
    settings = settings_of(tmp_path, {"model_type": "no_such_type", "hidden_size": 8}, num_layers=2, hidden_size=8)
    assert list(architecture_faults(settings)) == []
    assert [str(note) for note in notes(settings)] == [
        "num_layers = 2: it changes nothing, and the model's config.json does not say whether it is so"
    ]


@pytest.mark.parametrize("value", ["x", [], {}, 0, -1, 10**12, [[1]], {"a": {"b": 1}}, True, 1e400])
def test_a_damaged_config_json_stops_nothing(value: Any, tmp_path: pathlib.Path) -> None:
    flat = parse_command_line(MODELS["DeepSeek-V3"]["flags"].split()).flat
    for model in (dict.fromkeys(MODELS["DeepSeek-V3"]["config"], value), {"text_config": value, "model_type": value}):
        settings = settings_of(tmp_path, model, **flat)
        assert {fault.field for fault in architecture_faults(settings)} <= set(flat)
        assert {key for key, _ in undecided(settings)} <= set(flat)


def test_without_a_folder_nothing_is_compared() -> None:
    settings = examine(MINIMAL | {"num_layers": 3}).settings
    assert (list(architecture_faults(settings)), list(undecided(settings))) == ([], [])


def test_every_setting_of_these_sections_is_compared_or_says_that_it_is_not() -> None:
    sections = ("architecture", "experts", "attention")
    open_ones = {key for key, entry in catalog().items() if entry.section in sections and entry.ignored is None}
    assert open_ones - set(TABLE) == {"spec"}
    assert set(TABLE) <= open_ones
