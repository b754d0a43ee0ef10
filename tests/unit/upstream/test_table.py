from __future__ import annotations

import pytest
from config_cases import MINIMAL, faults_for

from miles.config import ConfigError
from miles.config.command.flags import parse_command_line
from miles.config.job import examine
from miles.config.schema.catalog import catalog
from miles.upstream.table import find, upstream_flags


def test_rows_are_found_by_flag_by_key_and_by_beginning() -> None:
    assert find("--wandb-mode") == find("wandb_mode") is not None
    assert find("--router-health-check-interval-secs") == find("router_anything")
    assert find("--router-prefill") != find("router_anything")
    assert find("--no-override-lr-scheduler") == find("--override-lr-scheduler") is not None
    assert find("--lr") is None  # a setting
    assert find("--no-such-flag") is None


def test_a_flag_that_is_no_setting_gets_its_own_reason_from_a_command_line_a_file_or_a_body() -> None:
    expected = "http_proxy = p, but services call each other without a proxy; leave it out"
    assert faults_for(http_proxy="p") == [expected]
    with pytest.raises(ConfigError) as error:
        parse_command_line(["--http-proxy", "p"]).config()
    assert expected in [str(fault) for fault in error.value.faults]


def test_a_flag_without_effect_is_taken_with_a_note() -> None:
    words = ["--use-miles-router", "--router-health-failure-threshold", "40"]
    examination = examine(MINIMAL | parse_command_line(words).flat)
    assert (examination.faults, [note.field for note in examination.notes]) == (
        [],
        ["use_miles_router", "router_health_failure_threshold"],
    )
    assert str(examination.notes[0]) == (
        "use_miles_router = true: it changes nothing: there is no router: the rollout service sends requests to its "
        "servers itself"
    )


def test_a_remedy_names_what_there_is() -> None:
    """Settings that a remedy says to set are settings, whatever else changes."""
    words = [
        word
        for row in upstream_flags()
        for part in row.remedy.split(";")
        if part.strip().startswith("set ")
        for word in part.replace(",", " ").split()
        if "_" in word
    ]
    assert [word for word in words if word not in catalog() and not word.startswith(("sglang_", "$"))] == []
