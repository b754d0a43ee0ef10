"""Whether every rank sees the folders that a job needs on every host: its models, and the folder of its checkpoints.

Ranks on several hosts write one checkpoint together, so its folder must be on storage that all hosts share. Rank 0
leaves a file there, and the others look for it.
"""

from __future__ import annotations

import contextlib
import pathlib
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

from miles.services.trainer.ranks.collective_calls import Command
from miles.services.trainer.ranks.network import host_name

if TYPE_CHECKING:
    from miles.config import JobConfig
    from miles.services.trainer.ranks.leader import Leader

LOOK = "look_for_folders"
_VISIBLE_S = 10.0
"""How long a file may take to be seen on another host: network file systems remember what was in a folder."""


async def check_shared_folders(leader: Leader, config: JobConfig, checkpoints: pathlib.Path) -> None:
    """Raise FileNotFoundError when a rank misses a folder, with its host; does nothing for one rank."""
    if leader.world_size == 1:
        return
    with _token(checkpoints) as token:
        arguments = {"checkpoints": str(checkpoints), "token": token.name, "folders": _folders(config)}
        reports = await leader.gather(Command(LOOK, arguments))
    if problems := list(dict.fromkeys(report.decode() for report in reports if report)):
        raise FileNotFoundError("; ".join(problems))


def look(command: Command) -> bytes:
    """Return what this rank misses, in words; empty when it sees everything."""
    arguments = command.arguments
    for key, folder in arguments["folders"].items():
        if not pathlib.Path(folder).is_dir():
            return f"{key} = {folder} is no folder on {host_name()}: every node needs it at that path".encode()
    checkpoints = pathlib.Path(arguments["checkpoints"])
    if not _appears(checkpoints / arguments["token"]):
        problem = f"the folder of checkpoints {checkpoints} on {host_name()} is not that of the trainer's node 0"
        return f"{problem}: set save (or run_dir) to a folder on storage that all nodes share".encode()
    return b""


def _folders(config: JobConfig) -> dict[str, str]:
    given = {
        "hf_checkpoint": config.rollout.hf_checkpoint,
        "ref_load": config.checkpoint.ref_load,
        "critic_load": config.checkpoint.critic_load,
        "lora_adapter_path": config.lora.lora_adapter_path,
        "load": config.checkpoint.load,
    }
    teachers = {f"opd_teacher_load {name}": folder for name, folder in config.distillation.teacher_folders.items()}
    return {key: folder for key, folder in given.items() if folder is not None} | teachers


@contextlib.contextmanager
def _token(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    folder.mkdir(parents=True, exist_ok=True)
    token = folder / f".seen-by-all-ranks-{uuid.uuid4().hex}"
    token.touch()
    try:
        yield token
    finally:
        token.unlink(missing_ok=True)


def _appears(path: pathlib.Path) -> bool:
    end = time.monotonic() + _VISIBLE_S
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
