"""The draft trainer's own checkpoint: one safetensors file with its JSON record in the header, replaced atomically.

It is written before the first recording is trained on and after each version is published. Before that, the version's
number is noted in a small file: a trainer that is killed in between goes on from the version before, and gives the next
number to what it publishes, so that a number never stands for two drafts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FILE = "draft.safetensors"
NOTED = "version"
"""Name of the small file."""
_RECORD = "miles.draft"
_VERSION = 1
"""Of the record."""


@dataclasses.dataclass(frozen=True, slots=True)
class DraftRecord:
    """The part of a checkpoint that is not tensors."""

    algorithm: str
    """Kind of the draft, e.g. "eagle3"."""
    draft_model: str
    """Folder that it began from, or words for the run's own."""
    version: int
    """Version that these weights are published as; 0 is the draft that the run began with."""
    recorded_step: int
    """Training step of the policy whose recording was dealt with last; -1 before the first."""
    recordings: int
    """Recordings trained on, a count."""
    missed_recordings: int
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Of this version."""


class UnusableDraftCheckpointError(ValueError):
    """A checkpoint is there and cannot be gone on from."""

    def __init__(self, path: pathlib.Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}; remove it to begin again from the draft model's folder")


def note_version(folder: pathlib.Path, version: int) -> None:
    """Keep the newest version's number, which engines may know as soon as this returns. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{NOTED}.tmp"
    partial.write_text(f"{version}\n")
    _put_in_place(partial, folder / NOTED)


def noted_version(folder: pathlib.Path) -> int:
    """The number that was noted last; 0 before the first. Raises UnusableDraftCheckpointError."""
    path = folder / NOTED
    try:
        return int(path.read_text()) if path.exists() else 0
    except ValueError as error:
        raise UnusableDraftCheckpointError(path, "it is not the number of a version") from error


def save(folder: pathlib.Path, record: DraftRecord, state: Mapping[str, torch.Tensor]) -> pathlib.Path:
    """Write a checkpoint in place of the one before; it is there as a whole or not at all. Returns its file.

    `state`: contiguous, on the CPU.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / FILE, folder / f"{FILE}.tmp"
    header = json.dumps({"format": _VERSION, **dataclasses.asdict(record)})
    save_file(dict(state), partial, {_RECORD: header})
    _put_in_place(partial, path)
    return path


def load(folder: pathlib.Path) -> tuple[DraftRecord, dict[str, torch.Tensor]] | None:
    """Read the checkpoint, on the CPU; None when there is none. Raises UnusableDraftCheckpointError."""
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            record = _record((file.metadata() or {}).get(_RECORD))
            return record, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UnusableDraftCheckpointError(path, f"it cannot be read as a checkpoint of a draft ({error})") from error


def _record(text: str | None) -> DraftRecord:
    data: dict[str, Any] = json.loads(text or "{}")
    if (version := data.pop("format", 0)) != _VERSION:
        raise ValueError(f"its record is of version {version}, and this installation knows {_VERSION}")
    return DraftRecord(**data)


def _put_in_place(partial: pathlib.Path, path: pathlib.Path) -> None:
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


def _sync(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
