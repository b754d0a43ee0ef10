"""A smallest valid configuration, and strategies for others."""

from __future__ import annotations

import re
from typing import Any

from hypothesis import strategies as st

from miles.config import ConfigError, JobConfig
from miles.config.schema.catalog import Entry, catalog

MINIMAL: dict[str, Any] = {
    "hf_checkpoint": "model",
    "prompt_data": "prompts.jsonl",
    "label_key": "answer",
    "num_rollout": 10,
    "rollout_batch_size": 8,
    "n_samples_per_prompt": 4,
    "rollout_max_response_len": 16,
    "rm_type": "math",
}

BATCH_SIZES = ("rollout_batch_size", "n_samples_per_prompt", "global_batch_size", "num_steps_per_rollout")

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def faults_for(**changes: Any) -> list[str]:
    """What the minimal configuration with these changes is refused for, one line a fault."""
    return faults_of(MINIMAL | changes)


def faults_of(flat: dict[str, Any]) -> list[str]:
    """What a flat configuration is refused for, one line a fault."""
    try:
        JobConfig.from_flat(flat)
    except ConfigError as error:
        return [str(fault) for fault in error.faults]
    return []


def values(entry: Entry) -> st.SearchStrategy[Any]:
    """Values that a field may hold, some of them outside its limits."""
    if entry.choices:
        return st.sampled_from(entry.choices)
    if entry.kind is tuple:
        return st.lists(st.integers(0, 99) if entry.element is int else TEXT, max_size=3)
    return {
        bool: st.booleans(),
        int: st.integers(-1, 64),
        float: st.floats(0, 3, allow_nan=False),
        str: TEXT,
        dict: st.dictionaries(TEXT, TEXT, max_size=2),
    }[entry.kind]


@st.composite
def flat_configs(draw: st.DrawFn) -> dict[str, Any]:
    """A valid flat configuration: random settings, less those that are at fault together."""
    keys = draw(st.lists(st.sampled_from(sorted(catalog())), max_size=25, unique=True))
    flat = MINIMAL | {key: draw(values(catalog()[key])) for key in keys}
    while faults := faults_of(flat):
        named = {word for fault in faults for word in re.findall(r"\w+", fault)}
        if named & set(BATCH_SIZES):
            named |= set(BATCH_SIZES)
        repaired = {key: value for key, value in flat.items() if key not in named} | {
            key: value for key, value in MINIMAL.items() if key in named
        }
        assert repaired != flat, f"of the settings that were given, no fault names one to change: {faults}"
        flat = repaired
    return flat
