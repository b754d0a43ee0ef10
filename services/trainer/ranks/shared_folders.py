"""Whether every rank sees the folders that a job needs on every host: its models, and the folders that ranks share.

Ranks on several hosts write one checkpoint together, and one recording for the draft trainer, so those folders must be
on storage that all hosts share. Rank 0 leaves a file in each, and the others look for it.
"""

from __future__ import annotations

import contextlib
import pathlib
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

from miles.drafts.folders import initial_dir
from miles.services.trainer.ranks.collective_calls import Command
from miles.services.trainer.ranks.network import host_name

if TYPE_CHECKING:
    from miles.config import JobConfig
    from miles.services.trainer.ranks.leader import Leader

LOOK = "look_for_folders"
_CHECKPOINTS, _RECORDINGS = "checkpoints", "recordings"
_SET_BY = {_CHECKPOINTS: "save (or run_dir)", _RECORDINGS: "draft_recordings_dir (or run_dir)"}
_VISIBLE_S = 10.0
"""How long a file may take to be seen on another host: network file systems remember what was in a folder."""


async def check_shared_folders(
    leader: Leader, config: JobConfig, checkpoints: pathlib.Path, recordings: pathlib.Path
) -> None:
    """Raise FileNotFoundError when a rank misses a folder, with its host; does nothing for one rank.

    `recordings` is looked for where drafts are trained.
    """
    if leader.world_size == 1:
        return
    shared = {_CHECKPOINTS: checkpoints, **({_RECORDINGS: recordings} if config.drafts.enable_draft_training else {})}
    with contextlib.ExitStack() as tokens:
        left = {name: str(tokens.enter_context(_token(folder))) for name, folder in shared.items()}
        reports = await leader.gather(Command(LOOK, {"tokens": left, "folders": _folders(config)}))
    if problems := list(dict.fromkeys(report.decode() for report in reports if report)):
        raise FileNotFoundError("; ".join(problems))


def look(command: Command) -> bytes:
    """Return what this rank misses, in words; empty when it sees everything."""
    arguments = command.arguments
    for key, folder in arguments["folders"].items():
        if not pathlib.Path(folder).is_dir():
            return f"{key} = {folder} is no folder on {host_name()}: every node needs it at that path".encode()
    for name, token in arguments["tokens"].items():
        folder = pathlib.Path(token).parent
        if not _appears(pathlib.Path(token)):
            problem = f"the folder of {name} {folder} on {host_name()} is not that of the trainer's node 0"
            return f"{problem}: set {_SET_BY[name]} to a folder on storage that all nodes share".encode()
    return b""


def _folders(config: JobConfig) -> dict[str, str]:
    given = {
        "hf_checkpoint": config.rollout.hf_checkpoint,
        "ref_load": config.checkpoint.ref_load,
        "critic_load": config.checkpoint.critic_load,
        "lora_adapter_path": config.lora.lora_adapter_path,
        "load": config.checkpoint.load,
    }
    draft = config.rollout.sglang_args.get("speculative_draft_model_path")
    if config.drafts.enable_draft_training and draft != str(initial_dir(pathlib.Path(config.services.run_dir))):
        given["sglang_speculative_draft_model_path"] = draft  # it says which layers are recorded
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
