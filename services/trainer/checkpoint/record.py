"""The JSON record of a checkpoint, and its folder, which appears complete or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
from typing import TYPE_CHECKING, Any

from miles.services.trainer.checkpoint.state import TrainerState

if TYPE_CHECKING:
    from miles.config import JobConfig

RECORD_FILE = "trainer.json"
LATEST_FILE = "latest"
_NAME = re.compile(r"step_(\d{8,})(\.old)?")
_WHERE_AND_HOW = (
    *("run_dir", "host", "redis_url", "load", "save", "async_save", "name", "log_samples_per_step"),
    "stop_timeout",
)
"""Settings that may differ between a run and its continuation without changing what is computed (ports too)."""


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """The part of a checkpoint that is not tensors."""

    state: TrainerState
    iteration: int
    """Optimizer steps taken."""
    world_size: int
    """Ranks that wrote it."""
    config_digest: str
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


def folder_name(step: int) -> str:
    """Name of the checkpoint's folder after `step` training steps."""
    return f"step_{step:08d}"


def newest(directory: pathlib.Path) -> pathlib.Path | None:
    """The complete checkpoint of the most steps below `directory`, or None.

    One that was being replaced when the trainer died is found under its old name.
    """
    if not directory.is_dir():
        return None
    found = [
        (int(match[1]), match[2] is None, path)
        for path in directory.iterdir()
        if (match := _NAME.fullmatch(path.name)) and (path / RECORD_FILE).is_file()
    ]
    return max(found)[2] if found else None


def digest(config: JobConfig) -> str:
    """SHA-256 of the settings that training depends on."""
    flat = {
        key: value for key, value in config.to_flat().items() if key not in _WHERE_AND_HOW and not key.endswith("_port")
    }
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()


def complete(partial: pathlib.Path, directory: pathlib.Path, record: CheckpointRecord) -> None:
    """Write the record beside the tensors in `partial`, then rename that to `directory`; on one rank."""
    (partial / RECORD_FILE).write_text(json.dumps(_to_json(record), indent=1))
    _sync_tree(partial)
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
        return _from_json(json.loads(path.read_text()))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint's record: {error!r}") from error


def check_base(directory: pathlib.Path, base: str, former: str) -> None:
    """Raise ValueError unless a checkpoint was saved on this base: an adapter only works on its own base.

    `former` is the name of the same base in older checkpoints.
    """
    saved = read_record(directory).base
    if saved in (base, former):
        return
    holds = f"an adapter of base {saved}" if saved else "a whole policy"
    wanted = f"an adapter of base {base} (hf_checkpoint)" if base else "a whole policy (lora_rank is 0)"
    raise ValueError(f"{directory} holds {holds}, but {wanted} is trained; resume with the settings it was saved under")


def _to_json(record: CheckpointRecord) -> dict[str, Any]:
    return {
        "state": record.state.to_json(),
        "iteration": record.iteration,
        "world_size": record.world_size,
        "config_digest": record.config_digest,
        "loss_scale": record.loss_scale,
        "good_steps": record.good_steps,
        "critic_iteration": record.critic_iteration,
        "critic_loss_scale": record.critic_loss_scale,
        "critic_good_steps": record.critic_good_steps,
        "old_versions": list(record.old_versions),
        "base": record.base,
    }


def _from_json(data: dict[str, Any]) -> CheckpointRecord:
    names = [
        field.name
        for field in dataclasses.fields(CheckpointRecord)
        if field.name in data or field.default is dataclasses.MISSING  # what older checkpoints lack has a default
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
