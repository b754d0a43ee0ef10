"""Which checkpoint a folder holds, by names, records and sizes of files; tensors are never read.

FOLDER/step_00000012/trainer.json    a checkpoint and its record, which is written last and lists the other files
FOLDER/step_00000012.tmp             one that was being written
FOLDER/step_00000012.old             one that was being replaced
FOLDER/latest                        name of the newest checkpoint, for people and scripts
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator

RECORD_FILE = "trainer.json"
LATEST_FILE = "latest"
_NAME = re.compile(r"step_(\d{8,})(\.old|\.tmp)?")


class NoCheckpointError(FileNotFoundError):
    """A folder holds no checkpoint that can be loaded."""

    def __init__(self, folder: pathlib.Path, problem: str, remedy: str) -> None:
        super().__init__(f"no checkpoint can be loaded from {folder}: {problem}; {remedy}")
        self.problem = problem
        self.remedy = remedy


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """The newest complete checkpoint of a folder, and newer ones that were passed over."""

    checkpoint: pathlib.Path | None
    passed_over: tuple[tuple[pathlib.Path, str], ...] = ()
    """Newer ones that are not complete, each with the reason."""

    @property
    def damaged(self) -> tuple[tuple[pathlib.Path, str], ...]:
        """Those passed over that were complete once, or were copied in part; not those that a crash interrupted."""
        return tuple(each for each in self.passed_over if each[0].suffix != ".tmp")

    def words(self) -> str:
        """What was passed over, for people."""
        return "; ".join(f"{path}: {why}" for path, why in self.passed_over)


def folder_name(step: int) -> str:
    """Name of the checkpoint's folder after `step` training steps."""
    return f"step_{step:08d}"


def step_of(folder: str | pathlib.Path) -> int | None:
    """Return the training steps that a checkpoint covers, by its folder's name; None for another folder."""
    match = _NAME.fullmatch(pathlib.Path(folder).name)
    return None if match is None or match[2] else int(match[1])


def newest(folder: pathlib.Path) -> Found:
    """Find the complete checkpoint of the most steps in a folder, which need not exist.

    One that was being replaced when the trainer died is found under its old name. Raises OSError when the folder
    cannot be read.
    """
    passed_over: list[tuple[pathlib.Path, str]] = []
    found: pathlib.Path | None = None
    for path in _by_age(folder):
        why = why_incomplete(path)
        if why is None:
            found = path
            break
        passed_over.append((path, why))
    marked = _marked(folder)
    if marked is not None and not marked.exists() and (found is None or found.name < marked.name):
        passed_over.insert(0, (marked, f"{LATEST_FILE} names it, but it is not there"))
    return Found(found, tuple(passed_over))


def why_incomplete(checkpoint: pathlib.Path) -> str | None:
    """Say what a checkpoint lacks; None when every file that its record lists has its size."""
    if checkpoint.suffix == ".tmp":
        return "it was being written when its trainer ended"
    path = checkpoint / RECORD_FILE
    if not path.is_file():
        return f"{RECORD_FILE} is missing in it"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return f"its {RECORD_FILE} is not JSON"
    sizes = record.get("files", {}) if isinstance(record, dict) else {}
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing in it"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
    return None


def to_load(load: pathlib.Path) -> Found:
    """Find what `load` names: a checkpoint, or the newest in a folder of them.

    Raises NoCheckpointError with what the path is instead, and the one that would do where there is one.
    """
    if not load.exists():
        raise NoCheckpointError(load, "there is no such folder", "give a folder of checkpoints, or leave load out")
    if not load.is_dir():
        raise NoCheckpointError(load, "it is a file", "give the folder that holds the checkpoints")
    if _NAME.fullmatch(load.resolve().name) or (load / RECORD_FILE).is_file():
        why = why_incomplete(load)
        if why is not None:
            raise NoCheckpointError(load, why, "copy it again, or give another checkpoint")
        return Found(load)
    found = newest(load)
    if found.checkpoint is not None:
        return found
    if found.passed_over:
        raise NoCheckpointError(load, f"none is complete: {found.words()}", "copy it again, or give another folder")
    raise NoCheckpointError(load, *_what_else(load))


def same_folder(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether two paths name one folder, which need not exist."""
    return one.resolve() == other.resolve()


def _by_age(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Checkpoints in a folder, complete or not, newest first; of the same step those in place come first."""
    if not folder.is_dir():
        return
    matches = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    order = {None: 2, ".old": 1, ".tmp": 0}
    ranked = sorted(matches, key=lambda each: (int(each[0][1]), order[each[0][2]]), reverse=True)
    for match, path in ranked:
        if match[2] == ".tmp" and (folder / folder_name(int(match[1]))).is_dir():
            continue  # a second attempt at a checkpoint that there is
        yield path


def _marked(folder: pathlib.Path) -> pathlib.Path | None:
    """The checkpoint that the file `latest` names."""
    marker = folder / LATEST_FILE
    if not marker.is_file():
        return None
    name = marker.read_text(encoding="utf-8", errors="replace").strip()
    return folder / name if _NAME.fullmatch(name) else None


def _what_else(folder: pathlib.Path) -> tuple[str, str]:
    """What a folder without checkpoints is, and what to do."""
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return "it is empty", "give a folder of checkpoints, or leave load out to start from hf_checkpoint"
    for name in names:
        below = folder / name
        if below.is_dir() and newest(below).checkpoint is not None:
            return "its checkpoints are one folder further down", f"give {below}"
    if "adapter_config.json" in names:
        return "it is a PEFT adapter", "give it as lora_adapter_path"
    if "config.json" in names:
        return (
            "it is a Hugging Face model, such as save_hf writes",
            "give it as hf_checkpoint",
        )
    if "latest_checkpointed_iteration.txt" in names or any(name.startswith("iter_") for name in names):
        remedy = f"`miles convert dist-to-hf --load {folder} …`, and give what it writes as hf_checkpoint"
        return "it is a checkpoint of Megatron-LM, which train_backend megatron alone reads", remedy
    if ".metadata" in names:
        return f"it has tensors, but no {RECORD_FILE}", "copy the whole checkpoint again"
    return f"there is no checkpoint ({folder_name(0)[:-8]}…) in it", "give the folder that `save` named"
