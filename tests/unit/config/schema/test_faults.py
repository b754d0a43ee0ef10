from __future__ import annotations

from typing import Any

import pytest
from config_cases import MINIMAL

from miles.client.errors import MilesError
from miles.config import ConfigError, JobConfig
from miles.config.schema.catalog import catalog
from miles.config.schema.faults import Fault, show, unknown_name


def faults(changes: dict[str, Any]) -> list[dict[str, Any]]:
    with pytest.raises(ConfigError) as error:
        JobConfig.from_flat(MINIMAL | changes)
    return [fault.to_json() for fault in error.value.faults]


def test_a_fault_of_a_missing_setting_is_whole_beside_its_name_and_as_a_sentence() -> None:
    (fault,) = faults({"num_rollout": None})
    assert fault["problem"] == "it is not set, and neither is num_epoch"
    assert fault["message"] == (
        "num_rollout is not set, and neither is num_epoch; set one of them, so that the run has an end"
    )
    (fault,) = faults({"prompt_data": None})
    assert fault["problem"] == "it is not set, and training needs prompts"


def test_a_refusal_over_rest_names_each_value() -> None:
    document = {"title": "The configuration has faults", "faults": faults({"lr": -1, "prompt_data": None})}
    assert MilesError(document).describe().splitlines() == [
        "The configuration has faults:",
        "  lr = -1, but it must be at least 0; raise it",
        "  prompt_data is not set, and training needs prompts; set it to a JSONL or Parquet file",
    ]


def test_values_are_shown_on_one_line_and_cut() -> None:
    assert show("a\nb") == '"a\\nb"'
    assert show("") == '""'
    assert show(["a", 1]) == '["a", 1]'
    assert len(show("x" * 10_000)) < 400


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("--learning-rate", "--lr"),
        ("--num-generations", "--n-samples-per-prompt"),
        ("--gpu-memory-utilization", "--sglang-mem-fraction-static"),
    ],
)
def test_names_of_other_systems_are_understood(name: str, meant: str) -> None:
    fault = unknown_name(name, 1, [entry.flag for entry in catalog().values()], "flag")
    assert fault.remedy == f"did you mean {meant}?"


def test_a_group_of_settings_is_refused_with_the_way_out() -> None:
    assert unknown_name("rollout", {"batch_size": 3}, ["num_rollout"], "setting") == Fault(
        "rollout",
        {"batch_size": 3},
        "there is no such setting, and settings are in no groups",
        "write its keys by themselves",
    )
