"""Checkpoints: PyTorch distributed checkpoints beside a JSON record, written whole or not at all.

DIR/step_00000012/          appears by rename, once everything in it is on disk
    .metadata, *.distcp     parameters, optimizer state and random states, readable with another number of ranks
    trainer.json            `Record`
DIR/latest                  name of the newest checkpoint, for people and scripts; `newest` looks at the folders
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from miles.services.trainer.checkpoint_record import Record, complete, read_record


@dataclasses.dataclass(frozen=True, slots=True)
class Contents:
    """What has tensors to save."""

    policy: torch.nn.Module
    optimizer: torch.optim.Optimizer | None
    """None to leave its state out."""
    reference: torch.nn.Module | None
    """None unless it changes during the run."""


def save(directory: pathlib.Path, contents: Contents, record: Record) -> None:
    """Write a checkpoint to `directory`, replacing one of the same name; collective over ranks.

    A crash at any moment leaves either no folder of that name, or the old one, or the new one whole.
    """
    partial = directory.with_name(directory.name + ".tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    state_dict_saver.save(_tensors(contents), checkpoint_id=partial)
    if dist.get_rank() == 0:
        complete(partial, directory, record)
    dist.barrier()


def load(directory: pathlib.Path, contents: Contents) -> Record:
    """Read a checkpoint into the models and the optimizer, and restore the random state; collective over ranks.

    Raises FileNotFoundError when it is incomplete and ValueError when the record cannot be read.
    """
    record = read_record(directory)
    tensors = _tensors(contents)
    available = FileSystemReader(directory).read_metadata().state_dict_metadata
    random_key = _random_key()
    if not any(key.startswith(f"{random_key}.") for key in available):
        del tensors[random_key]  # written by fewer ranks
    state_dict_loader.load(tensors, checkpoint_id=directory)
    contents.policy.load_state_dict(tensors["model"])
    if contents.optimizer is not None:
        set_optimizer_state_dict(contents.policy, contents.optimizer, tensors["optimizer"])
    if contents.reference is not None:
        contents.reference.load_state_dict(tensors["reference"])
    if random_key in tensors:
        _set_random_state(tensors[random_key])
    return record


def _tensors(contents: Contents) -> dict[str, Any]:
    tensors: dict[str, Any] = {"model": contents.policy.state_dict(), _random_key(): _random_state()}
    if contents.optimizer is not None:
        tensors["optimizer"] = get_optimizer_state_dict(contents.policy, contents.optimizer)
    if contents.reference is not None:
        tensors["reference"] = contents.reference.state_dict()
    return tensors


def _random_key() -> str:
    return f"random_{dist.get_rank()}"


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
