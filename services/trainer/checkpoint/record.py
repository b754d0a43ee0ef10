"""The JSON record of a checkpoint, and its folder, which appears complete or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from miles.checkpoint_folder import LATEST_FILE, RECORD_FILE
from miles.services.trainer.checkpoint.errors import MisfitError
from miles.services.trainer.checkpoint.state import TrainerState

VERSION = 2
"""Of the record; one of a newer version may mean something that this code does not know."""


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """The part of a checkpoint that is not tensors."""

    state: TrainerState
    iteration: int
    """Optimizer steps taken."""
    world_size: int
    """Ranks that wrote it."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Those that `resume_rules` compares with the run's; empty in records of version 1."""
    loss_scale: float = 1.0
    good_steps: int = 0
    """Steps since the loss scale last changed; see `LossScale`."""
    critic_iteration: int = 0
    critic_loss_scale: float = 1.0
    critic_good_steps: int = 0
    old_versions: tuple[int, ...] = ()
    """Versions of the `OldPolicies` whose weights are in the checkpoint."""
    base: str = ""
    """Identity of the weights that the saved adapter adapts, in hex; empty when the whole policy was saved."""


def complete(partial: pathlib.Path, directory: pathlib.Path, record: CheckpointRecord) -> None:
    """Write the record beside the tensors in `partial`, then rename that to `directory`; on one rank."""
    _sync_tree(partial)  # before sizes are read: other hosts may have written the files
    sizes = {str(path.relative_to(partial)): path.stat().st_size for path in partial.rglob("*") if path.is_file()}
    (partial / RECORD_FILE).write_text(json.dumps({**_to_json(record), "files": sizes}, indent=1))
    _sync(partial / RECORD_FILE)
    _sync(partial)
    if directory.exists():
        doomed = directory.with_name(directory.name + ".old")
        shutil.rmtree(doomed, ignore_errors=True)
        directory.rename(doomed)
        partial.rename(directory)
        shutil.rmtree(doomed)
    else:
        partial.rename(directory)
    _write_atomically(directory.parent / LATEST_FILE, directory.name)
    _sync(directory.parent)


def read_record(directory: pathlib.Path) -> CheckpointRecord:
    """Read the record of a checkpoint; raises FileNotFoundError or ValueError."""
    path = directory / RECORD_FILE
    try:
        data = dict(json.loads(path.read_text()))
        version = int(data.get("version", 1))
        record = _from_json(data) if version <= VERSION else None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint's record: {error!r}") from error
    if record is None:
        problem = f"it was written by a newer installation (version {version}; this one knows up to {VERSION})"
        raise ValueError(f"{path}: {problem}; resume with that installation, or start from its export (save_hf)")
    return record


def check_base(directory: pathlib.Path, record: CheckpointRecord, base: str, former: str) -> None:
    """Raise MisfitError unless a checkpoint was saved on this base: an adapter only works on its own base.

    `former` is the name of the same base in older checkpoints.
    """
    saved = record.base
    if saved in (base, former):
        return
    holds = f"an adapter of base {saved}" if saved else "a whole policy"
    wanted = f"an adapter of base {base} (hf_checkpoint)" if base else "a whole policy (lora_rank is 0)"
    raise MisfitError(f"{directory} holds {holds}, but {wanted} is trained; resume as it was saved")


def _to_json(record: CheckpointRecord) -> dict[str, Any]:
    return {
        "version": VERSION,
        "state": record.state.to_json(),
        "iteration": record.iteration,
        "world_size": record.world_size,
        "settings": dict(record.settings),
        "loss_scale": record.loss_scale,
        "good_steps": record.good_steps,
        "critic_iteration": record.critic_iteration,
        "critic_loss_scale": record.critic_loss_scale,
        "critic_good_steps": record.critic_good_steps,
        "old_versions": list(record.old_versions),
        "base": record.base,
    }


def _from_json(data: Mapping[str, Any]) -> CheckpointRecord:
    names = [
        field.name
        for field in dataclasses.fields(CheckpointRecord)
        if field.name in data or field.name in ("state", "iteration", "world_size")  # the others have defaults
    ]
    fields = {name: data[name] for name in names}
    versions = tuple(int(version) for version in fields.pop("old_versions", ()))
    return CheckpointRecord(**fields | {"state": TrainerState.from_json(data["state"]), "old_versions": versions})


def _write_atomically(path: pathlib.Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text + "\n")
    _sync(partial)
    partial.replace(path)


def _sync_tree(directory: pathlib.Path) -> None:
    for path in directory.rglob("*"):
        _sync(path)
    _sync(directory)


def _sync(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
