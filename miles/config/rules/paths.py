"""Rules about text that names files and folders; whether they exist is checked elsewhere."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping

from miles.config.eval_sets import INLINE
from miles.config.rules.registry import rule
from miles.config.schema.catalog import Entry, catalog
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings
from miles.config.sections.distillation import split_name
from miles.ownership.place import stepless
from miles.precision.te_config import BASE64

_CONTENT: Mapping[str, str] = {"eval_config": INLINE, "te_precision_config_file": BASE64}
"""Settings that name a file or, after this beginning, are its content."""
_NAME_BYTES = 255
_PATH_BYTES = 4000
"""Less than Linux takes, as names are added below."""


@rule
def paths_can_be_paths(s: FlatSettings) -> Iterator[Fault]:
    for key, entry in catalog().items():
        if s.is_valid(key) and (bad := _first_bad(entry, getattr(s, key))) is not None:
            yield Fault(key, bad, _why_no_path(bad), "give a path, or leave it out")


@rule
def paths_are_written_out(s: FlatSettings) -> Iterator[Fault]:
    for key, entry in catalog().items():
        if not _names_paths(entry):
            continue
        for path in _paths(entry, getattr(s, key)):
            if path.startswith("~") or re.search(r"\$\w|\$\{", path):
                written = os.path.expandvars(os.path.expanduser(path))
                remedy = f"write {written}" if written != path else "write the whole path"
                yield Fault(key, path, "~ and $NAME are expanded by a shell alone", remedy)


@rule
def save_hf_has_no_other_placeholder(s: FlatSettings) -> Iterator[Fault]:
    if s.save_hf is not None and not _is_pattern(s.save_hf):
        problem = "{rollout_id} is its only placeholder"
        yield Fault("save_hf", s.save_hf, problem, "double other braces, as {{ and }}")


@rule
def tb_experiment_name_is_one_folder(s: FlatSettings) -> Iterator[Fault]:
    name = s.tb_experiment_name
    if name is not None and (not name or name in (".", "..") or "/" in name or _why_no_path(name)):
        problem = "it names a folder below that of all experiments"
        yield Fault("tb_experiment_name", name, problem, "give a name without slashes")


def unusable_paths(s: FlatSettings) -> list[str]:
    """Return the settings that name no path at all, which checks of files would trip over."""
    bad = [
        key for key, entry in catalog().items() if s.is_valid(key) and _first_bad(entry, getattr(s, key)) is not None
    ]
    pattern = s.save_hf if s.is_valid("save_hf") else None
    return bad if pattern is None or _is_pattern(pattern) else [*bad, "save_hf"]


def _is_pattern(text: str) -> bool:
    try:
        stepless(text)
    except ValueError:
        return False
    return True


def _names_paths(entry: Entry) -> bool:
    return bool({"DIR", "FILE"} & set(re.findall(r"[A-Z]+", entry.metavar)))


def _first_bad(entry: Entry, value: object) -> str | None:
    """Return the first path of a setting that cannot be one."""
    if not _names_paths(entry):
        return None
    return next((path for path in _paths(entry, value) if _why_no_path(path)), None)


def _paths(entry: Entry, value: object) -> list[str]:
    if isinstance(value, str):
        return [] if value.startswith(_CONTENT.get(entry.key, "\0")) else [value]
    if not isinstance(value, tuple | list):
        return []
    if entry.metavar.startswith("[NAME=]"):
        return [split_name(str(item))[1] for item in value]
    pairs = entry.metavar.startswith("NAME ")
    return [str(item) for item in (value[1::2] if pairs else value)]


def _why_no_path(text: str) -> str:
    try:
        parts = os.fsencode(text).split(b"/")
    except UnicodeEncodeError:
        return "it has characters that no file name has"
    if not text:
        return "it is empty"
    if b"\0" in os.fsencode(text):
        return "it has a NUL byte"
    if len(os.fsencode(text)) > _PATH_BYTES or any(len(part) > _NAME_BYTES for part in parts):
        return "it is too long for a path"
    return ""
