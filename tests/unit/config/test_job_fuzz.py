from __future__ import annotations

import json
from typing import Any

import pytest
from config_cases import MINIMAL, flat_configs
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.config import ConfigError, JobConfig
from miles.config.command.flags import OWN_FLAGS, parse_command_line
from miles.config.schema.catalog import catalog

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
KEYS = st.sampled_from(sorted(catalog())) | st.text(max_size=8) | st.sampled_from(["sglang_x", "sglang_", "sglang"])


def read(flat: dict[str, Any]) -> JobConfig | ConfigError:
    try:
        return JobConfig.from_flat(flat)
    except ConfigError as error:
        return error


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(KEYS, JSON, max_size=12))
def test_whatever_is_sent_is_accepted_or_refused_field_by_field(changes: dict[str, Any]) -> None:
    result = read(MINIMAL | changes)
    if isinstance(result, JobConfig):
        assert JobConfig.from_flat(result.to_flat()) == result
    else:
        assert result.faults
        assert all(fault.field and fault.problem and fault.remedy for fault in result.faults)
        assert json.dumps([fault.to_json() for fault in result.faults])


@settings(deadline=None)
@given(st.text(max_size=20) | st.binary(max_size=20))
def test_a_body_that_is_no_json_object_is_refused(text: str | bytes) -> None:
    with pytest.raises(ConfigError):
        JobConfig.from_json(text)


@given(flat_configs())
@settings(deadline=None, max_examples=20)
def test_a_body_of_json_is_read(flat: dict[str, Any]) -> None:
    assert JobConfig.from_json(json.dumps(flat)) == JobConfig.from_flat(flat)


WORDS = st.sampled_from(["--lr", "--use-tis", "--rollout-stop", "--lr=1", "--sglang-x", "--no-use-tis", "--", "-1"])


@settings(deadline=None)
@given(st.lists(WORDS | st.text(max_size=6).filter(lambda word: not word.startswith(tuple(OWN_FLAGS))), max_size=8))
def test_any_command_line_is_read_or_refused(words: list[str]) -> None:
    line = parse_command_line(words)
    with pytest.raises(ConfigError) as error:
        line.config()
    assert "hf_checkpoint is not set" in str(error.value)
