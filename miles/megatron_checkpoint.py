"""Checkpoints in Megatron-Core's torch_dist format, those that Megatron-LM saved among them: where their tensors are.

FOLDER/latest_checkpointed_iteration.txt   `release`, or a number of iterations
FOLDER/release, FOLDER/iter_0000100        metadata.json, .metadata and files of tensors
"""

from __future__ import annotations

import pathlib

from miles.checkpoint_folder import RECORD_FILE, NoCheckpointError, newest

TRACKER_FILE = "latest_checkpointed_iteration.txt"


def tensors_of(folder: pathlib.Path, step: int | None = None) -> pathlib.Path | None:
    """Return where the tensors of a torch_dist checkpoint are, of the newest in a folder; None for other folders.

    `step` asks for that iteration of Megatron-LM's. Raises NoCheckpointError where tensors are missing, or in an older
    format of Megatron-LM, and OSError for a folder that cannot be read.
    """
    if _has_tensors(folder):
        return folder
    if step is None and not (folder / TRACKER_FILE).is_file():
        own = newest(folder).checkpoint
        return own if own is not None and _has_tensors(own) else None
    name = f"iter_{step:07d}" if step is not None else _tracked(folder)
    if _has_tensors(folder / name):
        return folder / name
    if any((folder / name).glob("mp_rank_*")):
        remedy = "convert it with Megatron-LM's --ckpt-convert-format torch_dist, or give a Hugging Face folder"
        raise NoCheckpointError(folder, f"{name} is in Megatron-LM's older format", remedy)
    raise NoCheckpointError(folder, f"there are no torch_dist files in {name}", "copy the whole checkpoint again")


def is_foreign(folder: pathlib.Path) -> bool:
    """Whether a folder is a checkpoint of another system in this format: it has no trainer's record."""
    return (folder / TRACKER_FILE).is_file() or (_has_tensors(folder) and not (folder / RECORD_FILE).is_file())


def _has_tensors(folder: pathlib.Path) -> bool:
    return all((folder / name).is_file() for name in ("metadata.json", ".metadata"))


def _tracked(folder: pathlib.Path) -> str:
    text = (folder / TRACKER_FILE).read_text(encoding="utf-8", errors="replace").strip()
    if text == "release":
        return text
    if not text.isdigit():
        remedy = "write release into it, or the number of iterations"
        raise NoCheckpointError(folder, f"its {TRACKER_FILE} says {text!r}", remedy)
    return f"iter_{int(text):07d}"
