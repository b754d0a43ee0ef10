from __future__ import annotations

import json
import pathlib
from typing import Any

import yaml
from config_cases import flat_configs
from hypothesis import given, reject, settings
from pydantic.fields import FieldInfo

from miles.config import ConfigError, JobConfig
from miles.config.command.flags import parse_command_line, to_command_line
from miles.config.command.yaml_files import read_file
from miles.config.job import examine
from miles.config.schema.catalog import SECTIONS, catalog
from miles.config.schema.section import says_nothing


def field_of(key: str) -> FieldInfo:
    return SECTIONS[catalog()[key].section].model_fields[key]


@settings(deadline=None, max_examples=50)
@given(flat_configs())
def test_a_configuration_is_the_same_in_every_spelling(tmp_path_factory: Any, flat: dict[str, Any]) -> None:
    config = JobConfig.from_flat(flat)
    replaced = {*examine(flat).settings.replaced, "train_backend", "rollout_backend"}
    left_out = {key for key, value in flat.items() if value in ([], {}) or says_nothing(field_of(key), value)}
    kept = {key: value for key, value in flat.items() if key not in replaced | left_out}
    assert config.to_flat() == config.to_flat() | kept
    assert JobConfig.from_flat(config.to_flat()) == config
    assert JobConfig.from_flat(json.loads(json.dumps(config.to_flat(), allow_nan=False))) == config

    path: pathlib.Path = tmp_path_factory.mktemp("yaml") / "job.yaml"
    path.write_text(yaml.safe_dump(config.to_flat()), encoding="utf-8")
    content, faults = read_file(str(path))
    assert faults == []
    expected = config.to_flat()
    assert {key: (expected[key], content.get(key)) for key in expected if expected[key] != content.get(key)} == {}
    assert parse_command_line(["--config", str(path)]).config() == config

    assert parse_command_line(to_command_line(config.to_flat())).config() == config


@settings(deadline=None, max_examples=50)
@given(flat_configs())
def test_resolving_twice_changes_nothing(flat: dict[str, Any]) -> None:
    try:
        config = JobConfig.from_flat(flat | {"actor_num_gpus_per_node": 1, "actor_num_nodes": 1, "micro_batch_size": 1})
    except ConfigError:
        reject()  # a layout of several ranks
    if config.cluster.distributed_backend == "nccl":
        return
    try:
        resolved = config.resolve("cpu")
    except ConfigError:  # it asks for what GPUs alone can do
        resolved = config.resolve("cuda")
    assert resolved.resolve("cpu") == resolved
    assert resolved.services.device != "auto"
