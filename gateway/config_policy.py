"""The policy for configurations of jobs: files below allowed roots, functions of allowed modules, allowed flags."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import re
import uuid
from collections.abc import Mapping
from typing import Any

from miles.config.schema.catalog import Entry, passthroughs
from miles.config.schema.faults import Fault
from miles.config.sections.distillation import split_name
from miles.gateway.config_schema import NAME_PATTERN, is_path, job_settings, type_faults
from miles.gateway.options import GatewayOptions
from miles.ownership.overlap import OUTPUTS
from miles.ownership.place import locate, locate_pattern

_SLICE = re.compile(r"@\[[^\]/]*\]$")
"""The rows of a data file: FILE@[a:b]."""
_WITH_ROWS = ("prompt_data", "eval_prompt_data")
"""Settings whose files may be given with rows; in another one they would be part of the path."""
_DUMPS = (
    "save_debug_rollout_data",
    "save_debug_train_data",
    "dump_details",
    "ci_save_grad_norm",
    "draft_recordings_dir",
)
"""Settings of files that a job writes outside of its run folder."""
_SPECULATION = frozenset(
    f"sglang_{name}"
    for name in (
        "speculative_algorithm",
        "speculative_num_steps",
        "speculative_eagle_topk",
        "speculative_num_draft_tokens",
        "speculative_adaptive",
        "speculative_use_rejection_sampling",
        "enable_draft_weights_cpu_backup",
    )
)
"""Flags of engines that any job may give: what engines draft with, and how much."""
_DRAFT_FOLDER = "sglang_speculative_draft_model_path"
"""A flag of engines that names a folder."""
_DEFAULT_NAME = "job"
"""Name of a job that gives none."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reviewed:
    """A reviewed body, to be checked by the controller and submitted."""

    flat: dict[str, Any]
    """The settings, with absolute paths and a run folder."""
    faults: list[Fault]
    refused: frozenset[str]
    """Keys with faults, whose values are not used any further."""


def review(body: Mapping[str, Any], policy: GatewayOptions, idempotency_key: str) -> Reviewed:
    """Check a body against the policy, and fill in the run folder.

    The folder is derived from the job's name and the idempotency key, so that a repeated submission has the same one.
    """
    flat = {key: value for key, value in body.items() if value is not None}
    faults = type_faults(flat)
    mistyped = {fault.field for fault in faults}
    for key, value in list(flat.items()):
        if key in mistyped:
            continue
        entry = job_settings().get(key)
        if entry is not None and is_path(entry):
            flat[key], found = _confined(entry, value, policy)
            faults += found or _writes_a_root(key, flat[key], policy)
        elif entry is not None and entry.dotted_path is not None:
            faults += _allowed_module(entry, value, policy)
        elif key == _DRAFT_FOLDER and isinstance(value, str):
            flat[key], found = _confined_path(key, value, policy)
            faults += found
        elif entry is None:
            faults += _allowed_passthrough(key, value, policy)
    faults += _name_and_run_dir(flat, mistyped, policy, idempotency_key)
    faults += _dumps_outside(flat, {fault.field for fault in faults})
    return Reviewed(flat, faults, frozenset(fault.field for fault in faults))


def _name_and_run_dir(
    flat: dict[str, Any], mistyped: set[str], policy: GatewayOptions, idempotency_key: str
) -> list[Fault]:
    name = flat.setdefault("name", _DEFAULT_NAME)
    if "name" in mistyped:
        return []
    if not re.fullmatch(NAME_PATTERN, name):
        remedy = "use letters, digits and ._- only, at most 64, the first a letter or digit"
        return [Fault("name", name, "folders are named after it", remedy)]
    if "run_dir" in flat:
        return []
    if policy.runs_dir is None:
        return [
            Fault("run_dir", None, "this gateway has no folder for runs", "set it to a folder below an allowed root")
        ]
    unique = hashlib.sha256(idempotency_key.encode()).hexdigest() if idempotency_key else uuid.uuid4().hex
    flat["run_dir"] = str(policy.runs_dir / f"{name}-{unique[:8]}")
    return []


def _dumps_outside(flat: Mapping[str, Any], refused: set[str]) -> list[Fault]:
    """A job's dumps replace what has their names, so they are in its own folder."""
    if "run_dir" not in flat or "run_dir" in refused:
        return []
    own = pathlib.Path(flat["run_dir"])
    problem, remedy = f"dumps replace files, and the job's own are below run_dir = {own}", "give a path there"
    return [
        Fault(key, flat[key], problem, remedy)
        for key in _DUMPS
        if key in flat and key not in refused and own not in pathlib.Path(flat[key]).parents
    ]


def _confined(entry: Entry, value: Any, policy: GatewayOptions) -> tuple[Any, list[Fault]]:
    """Return the value with absolute paths, and the faults of paths outside the roots."""
    if entry.kind is tuple:
        items = list(value)
        faults: list[Fault] = []
        first, apart = (1, 2) if entry.metavar.startswith("NAME ") else (0, 1)  # pairs of a name and a file
        for i in range(first, len(items), apart):
            path = split_name(items[i])[1] if entry.metavar.startswith("[NAME=]") else items[i]
            prefix = items[i].removesuffix(path)
            confined, found = _confined_path(entry.key, path, policy)
            items[i] = prefix + confined
            faults += found
        return items, faults
    return _confined_path(entry.key, value, policy)


def _confined_path(key: str, text: str, policy: GatewayOptions) -> tuple[str, list[Fault]]:
    rows = _SLICE.search(text) if key in _WITH_ROWS else None
    path, suffix = (text[: rows.start()], rows[0]) if rows else (text, "")
    if not policy.allowed_roots:
        remedy = "start the gateway with --allowed-root FOLDER"
        return text, [Fault(key, text, "this gateway lets jobs name no files", remedy)]
    roots = ", ".join(map(str, policy.allowed_roots))
    try:
        # Links are resolved here, so that the path that is passed on has none.
        absolute = pathlib.Path(os.path.realpath(policy.allowed_roots[0] / path))
    except (OSError, ValueError) as error:
        return text, [Fault(key, text, f"it cannot be a path ({error})", f"give a path below {roots}")]
    if not any(absolute.is_relative_to(root) for root in policy.allowed_roots):
        return text, [Fault(key, text, "it lies outside the folders that jobs may use", f"give a path below {roots}")]
    return str(absolute) + suffix, []


def _writes_a_root(key: str, value: Any, policy: GatewayOptions) -> list[Fault]:
    """A job may not have for itself what is everybody's: an allowed root, the folder of runs, or one above them."""
    if key not in OUTPUTS or not isinstance(value, str):
        return []
    try:
        place = locate_pattern(value) if key == "save_hf" else locate(value)
    except ValueError:
        return []  # the controller reports it
    everybodys = [*policy.allowed_roots, *([policy.runs_dir] if policy.runs_dir is not None else [])]
    if any(locate(root).lies_in(place) for root in everybodys):
        return [Fault(key, value, "other jobs use that folder too", "give a folder of its own below it")]
    return []


def _allowed_module(entry: Entry, value: str, policy: GatewayOptions) -> list[Fault]:
    assert entry.dotted_path is not None
    if value in entry.dotted_path.aliases:
        return []
    module = value.rpartition(".")[0]
    if any(module == allowed or module.startswith(allowed + ".") for allowed in policy.allowed_modules):
        return []
    allowed_names = ", ".join(policy.allowed_modules)
    remedy = (
        f"name a function of {allowed_names}"
        if allowed_names
        else "leave it out, or have the gateway started with --allowed-module"
    )
    return [Fault(entry.key, value, "jobs may not load code from that module", remedy)]


def _allowed_passthrough(key: str, value: Any, policy: GatewayOptions) -> list[Fault]:
    if not key.startswith(tuple(passthroughs())) or key in policy.allowed_passthrough:
        return []  # the controller reports unknown keys
    if key in _SPECULATION and isinstance(value, int | str):
        return []
    problem = "jobs may not give the engine this flag"
    return [Fault(key, value, problem, f"leave it out, or have the gateway started with --allowed-flag {key}")]


def resolved_roots(folders: list[str]) -> tuple[pathlib.Path, ...]:
    """Return the allowed roots as absolute paths without links."""
    return tuple(pathlib.Path(os.path.realpath(folder)) for folder in folders)
