from __future__ import annotations

from typing import Any

import pytest
from config_cases import MINIMAL

from miles.client.errors import MilesError
from miles.config import ConfigError, JobConfig
from miles.config.schema.faults import Fault, nearest, show, unknown_name


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
    ("name", "found"),
    [
        ("rollout-batch-size", "rollout_batch_size"),
        ("rollout_batchsize", "rollout_batch_size"),
        ("rollout_b", "rollout_batch_size"),
        ("tp", None),
    ],
)
def test_the_nearest_name_is_suggested_however_it_is_spelt(name: str, found: str | None) -> None:
    assert nearest(name, ["lr", "rm_type", "rollout_batch_size"]) == found


def test_a_group_of_settings_is_refused_with_the_way_out() -> None:
    assert unknown_name("rollout", {"batch_size": 3}, ["num_rollout"], "setting") == Fault(
        "rollout",
        {"batch_size": 3},
        "there is no such setting, and settings are in no groups",
        "write its keys by themselves",
    )
