"""Compares settings of the model's shape with its config.json."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

from miles.config.checks.architecture.attention import ATTENTION
from miles.config.checks.architecture.experts import EXPERTS
from miles.config.checks.architecture.hf_config import Expected, HfConfig
from miles.config.checks.architecture.layers import LAYERS, same
from miles.config.checks.json_file import read_json_object
from miles.config.layer_frequency import expert_layers, parse_layer_frequency
from miles.config.schema.faults import Fault, show
from miles.config.schema.flat_settings import FlatSettings

TABLE = {**LAYERS, **EXPERTS, **ATTENTION}
"""What each setting is compared with."""


def architecture_faults(s: FlatSettings) -> Iterator[Fault]:
    """Yield a fault for each setting that differs from config.json; nothing when that cannot be read."""
    for key, value, expected in _compared(s):
        if expected is None or not expected.values or _agrees(key, value, expected):
            continue
        problem = f"{expected.key} makes it {show(_shown(expected.values[0]))} in {s.hf_checkpoint}/config.json"
        yield Fault(key, value, problem, "correct it or leave it out, or choose the model's own folder")


def undecided(s: FlatSettings) -> Iterator[tuple[str, Any]]:
    """Yield each setting that nothing in config.json and in transformers' defaults can confirm, with its value."""
    for key, value, expected in _compared(s):
        if expected is None:
            yield key, value


def _compared(s: FlatSettings) -> Iterator[tuple[str, Any, Expected | None]]:
    said = [key for key in TABLE if s.is_valid(key) and not s.is_empty(key)]
    if not said or not s.hf_checkpoint:
        return
    if not (content := read_json_object(pathlib.Path(s.hf_checkpoint) / "config.json")):
        return
    model = HfConfig(content)
    for key in said:
        yield key, getattr(s, key), _expected(key, model)


def _expected(key: str, model: HfConfig) -> Expected | None:
    try:
        return TABLE[key](model)
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError):
        return None  # a value of another kind than models have there, which whatever reads the model reports


def _agrees(key: str, value: Any, expected: Expected) -> bool:
    if key == "moe_layer_freq":
        layers = expected.values[0]
        return expert_layers(parse_layer_frequency(value), len(layers)) == list(layers)
    return any(same(value, each) for each in expected.values)


def _shown(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
