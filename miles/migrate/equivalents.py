"""Upstream flags that are one or several other flags here."""

from __future__ import annotations

import base64
import binascii
import pathlib
from collections.abc import Callable, Mapping, Sequence

import yaml

from miles.config.schema.catalog import catalog

Flags = list[tuple[str, list[str]]]
_TRANSPORTS: Mapping[str, str] = {"nccl": "broadcast", "disk": "disk"}


def equivalent(flag: str, values: Sequence[str], find: Callable[[str], pathlib.Path | None]) -> Flags | None:
    """Return the flags that do the same here, or None when the flag is no other one. `find` finds files."""
    match flag, list(values):
        case "--offload", []:
            return [("--offload-train", []), ("--offload-rollout", [])]
        case "--warmup-ratio", [ratio]:
            return [("--lr-warmup-fraction", [ratio])]
        case "--update-weight-transport", [transport] if transport in _TRANSPORTS:
            return [("--update-weight-transfer-mode", [_TRANSPORTS[transport]])]
        case "--update-weight-mode", ["full"]:
            return []
        case "--custom-config-path", [name]:
            return _settings_in(name, find)
    return None


def _settings_in(name: str, find: Callable[[str], pathlib.Path | None]) -> Flags | None:
    """Return the flags of a file, or of its content in base64; None when it is not found, or some is no setting."""
    try:
        if name.startswith("base64:"):
            content = yaml.safe_load(base64.b64decode(name.removeprefix("base64:"), validate=True))
        elif (path := find(name)) is not None:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        else:
            return None
    except (binascii.Error, ValueError, OSError, yaml.YAMLError):
        return None
    if not isinstance(content, dict):
        return None
    flags: Flags = []
    for key, value in content.items():
        entry = catalog().get(str(key))
        if entry is None or isinstance(value, list | dict):
            return None
        if entry.kind is bool:
            flags.append((entry.flag if value != entry.negated else f"--no-{entry.flag[2:]}", []))
        elif value is not None:
            flags.append((entry.flag, [str(value)]))
    return flags


def staleness(program: str, flags: Mapping[str, Sequence[str]]) -> tuple[int, str] | None:
    """Return the max_weight_staleness that a script asks for by its program or by --fully-async, and why; else None."""
    interval = next(iter(flags.get("--update-weights-interval", [])), "1")
    steps = int(interval) if interval.isdigit() else 1
    always = "--fully-async" in flags or any("fully_async" in name for name in flags.get("--rollout-function-path", []))
    if always:
        return (
            steps + 1,
            "it generates beside training all the time; docs/asynchrony.md says what the bound does",
        )
    if program == "train_async":
        return steps, "train_async.py generates a batch while it trains on the one before (docs/asynchrony.md)"
    return None
