"""The schema of a job submission: its settings and their JSON types."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter

from miles.config.schema.catalog import SECTIONS, Entry, catalog, passthroughs
from miles.config.schema.faults import Fault

DEPLOYMENT = frozenset(
    {
        *(key for key in catalog() if key.endswith("_port")),
        *(key for key, entry in catalog().items() if entry.section in ("gateway", "tls")),
        *("device", "distributed_backend", "distributed_timeout_minutes", "host", "redis_url", "train_env_vars"),
    }
)
"""Settings of the running services, which a job cannot change."""

INDIRECT = frozenset({"eval_config", "sglang_config"})
"""Settings of files that hold paths or flags, which nobody compares with what jobs may use."""
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Names of jobs, which become folder names."""
_INT64 = 2**63
_JSON_TYPES: Mapping[type[Any], tuple[str, str]] = {
    bool: ("boolean", "true or false"),
    int: ("integer", "a whole number"),
    float: ("number", "a number"),
    str: ("string", "text"),
    tuple: ("array", "a list"),
    dict: ("object", "an object"),
}


@functools.cache
def job_settings() -> Mapping[str, Entry]:
    """Return every setting that a job may give, by key."""
    return {key: entry for key, entry in catalog().items() if key not in DEPLOYMENT | INDIRECT}


def is_path(entry: Entry) -> bool:
    """Return whether the setting's value names a file or folder."""
    return bool({"DIR", "FILE"} & set(re.findall(r"[A-Z]+", entry.metavar)))


def type_faults(body: Mapping[str, Any]) -> list[Fault]:
    """Return faults of values with the wrong JSON type, and of settings that a job cannot give.

    In a REST body "3" is not a number, although it is one on a command line.
    """
    faults = []
    for key, value in body.items():
        if key in DEPLOYMENT:
            problem = "it belongs to the services that run already"
            faults.append(Fault(key, value, problem, "leave it out"))
        elif key in INDIRECT:
            problem = "what the file says is not compared with what jobs may use"
            faults.append(Fault(key, value, problem, "leave it out, and give settings of their own"))
        elif key in job_settings() and value is not None and (wrong := _wrong_type(job_settings()[key], value)):
            faults.append(Fault(key, value, wrong, "give one"))
    return faults


def _wrong_type(entry: Entry, value: Any) -> str:
    if not _has_type(entry.kind, value):
        return f"it must be {_JSON_TYPES[entry.kind][1]}"
    if entry.kind is tuple and not all(_has_type(entry.element or str, item) for item in value):
        return f"each item must be {_JSON_TYPES[entry.element or str][1]}"
    if entry.kind is dict and not all(isinstance(item, str) for item in value.values()):
        return "each value must be text"
    texts = [value] if entry.kind is str else value if entry.kind is tuple else []
    if any(isinstance(text, str) and "\0" in text for text in texts):
        return "it must not contain a zero byte"
    return ""


def _has_type(kind: type[Any], value: Any) -> bool:
    if kind is bool:
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if kind is int:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return whole and -_INT64 <= value < _INT64
    if kind is float:
        return isinstance(value, int | float) and abs(value) <= 1e308 and math.isfinite(value)
    if kind is tuple:
        return isinstance(value, list)
    return isinstance(value, kind)


@functools.cache
def body_schema() -> dict[str, Any]:
    """Return the JSON schema of the body; the controller checks combinations of settings."""
    properties = {key: _property(entry) for key, entry in job_settings().items()}
    properties["name"]["pattern"] = NAME_PATTERN
    return {
        "type": "object",
        "title": "JobConfig",
        "description": "Settings by name, as on the command line. Null means not given.",
        "properties": properties,
        "patternProperties": {f"^{prefix}.+$": {} for prefix in passthroughs()},
        "additionalProperties": False,
    }


def _property(entry: Entry) -> dict[str, Any]:
    schema = _field_schema(entry)
    kind = _JSON_TYPES[entry.kind][0]
    described: dict[str, Any] = {"type": [kind, "null"], "description": entry.help}
    for limit in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        if limit in schema:
            described[limit] = schema[limit]
    if entry.choices:
        described["enum"] = [*entry.choices, None]
    if entry.kind is tuple:
        described["items"] = {"type": _JSON_TYPES[entry.element or str][0], **_limits(schema.get("items", {}))}
    if entry.kind is dict:
        described["additionalProperties"] = {"type": "string"}
    if entry.kind is int:
        if "exclusiveMinimum" not in described:
            described.setdefault("minimum", -_INT64)
        described.setdefault("maximum", _INT64 - 1)
    if entry.default is not None and entry.derived is None:
        described["default"] = list(entry.default) if entry.kind is tuple else entry.default
    return described


def _limits(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {key: schema[key] for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum") if key in schema}


def _field_schema(entry: Entry) -> dict[str, Any]:
    """Return the schema of a field, with the limits below any `anyOf`."""
    schema = _section_schema(entry.section)["properties"][entry.key]
    merged = dict(schema)
    for option in schema.get("anyOf", ()):
        merged |= option
    return merged


@functools.cache
def _section_schema(section: str) -> dict[str, Any]:
    return TypeAdapter(SECTIONS[section]).json_schema()


def example_body() -> dict[str, Any]:
    """Return an example configuration."""
    return {
        "name": "sums",
        "hf_checkpoint": "models/smollm2",
        "prompt_data": "data/train.jsonl",
        "input_key": "prompt",
        "label_key": "label",
        "rm_type": "math",
        "rollout_batch_size": 16,
        "n_samples_per_prompt": 8,
        "rollout_max_response_len": 128,
        "num_rollout": 100,
        "lr": 1e-6,
    }


def fault_documents(faults: Sequence[Fault]) -> list[dict[str, Any]]:
    """Return faults as a problem document lists them."""
    return [fault.to_json() for fault in faults]
