"""Checkpoints of the FSDP backend: PyTorch distributed checkpoints with a JSON record.

DIR/step_00000012/          appears by rename, once everything in it is on disk
    .metadata, *.distcp     parameters, optimizer state and random states, readable with another number of ranks
    trainer.json            `CheckpointRecord`
DIR/latest                  name of the newest checkpoint, for people and scripts; `newest` looks at the folders
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

from miles.services.trainer.backends.fsdp.model.sharded_model import named_weights
from miles.services.trainer.backends.fsdp.optimizer import make_state
from miles.services.trainer.checkpoint.background_save import (
    Saving,
    empty_folder,
    put_in_place,
)
from miles.services.trainer.checkpoint.choice import Say
from miles.services.trainer.checkpoint.errors import MisfitError
from miles.services.trainer.checkpoint.random_state import random_state, set_random_state
from miles.services.trainer.checkpoint.record import CheckpointRecord
from miles.services.trainer.step.old_policies import OldPolicies


@dataclasses.dataclass(frozen=True, slots=True)
class Trained:
    """A trained model and its optimizer."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer | None
    """None to leave its state out."""
    trained_only: bool = False
    """Whether to leave out frozen parameters, which are loaded from elsewhere."""

    def state(self) -> dict[str, Any]:
        """The model's tensors to save."""
        state: dict[str, Any] = self.model.state_dict()
        if not self.trained_only:
            return state
        return {name: state[name] for name, parameter in self.model.named_parameters() if parameter.requires_grad}


@dataclasses.dataclass(frozen=True, slots=True)
class Contents:
    """Everything whose tensors are saved."""

    policy: Trained
    critic: Trained | None = None
    reference: torch.nn.Module | None = None
    """None unless it changes during the run."""
    old_policies: OldPolicies | None = None

    def trained(self) -> dict[tuple[str, str], Trained]:
        """By the names of a model and of its optimizer's state."""
        found = {("model", "optimizer"): self.policy}
        return found if self.critic is None else found | {("critic", "critic_optimizer"): self.critic}


def save(directory: pathlib.Path, contents: Contents, record: CheckpointRecord) -> None:
    """Write a checkpoint to `directory`, replacing one of the same name; collective over ranks.

    A crash at any moment leaves no folder of that name, the old one, or the complete new one.
    """
    partial = empty_folder(directory)
    state_dict_saver.save(_tensors(contents), checkpoint_id=partial)
    put_in_place(partial, directory, record)


def begin(directory: pathlib.Path, contents: Contents, record: CheckpointRecord, group: dist.ProcessGroup) -> Saving:
    """As `save`, with a thread that writes copies of the tensors in host memory; collective over ranks.

    `group` has all ranks, works on host memory, and is used for nothing else until the checkpoint is complete.
    """
    partial = empty_folder(directory)
    written = state_dict_saver.async_save(_tensors(contents), checkpoint_id=partial, process_group=group)
    assert isinstance(written, Future)

    def finish() -> None:
        written.result()
        put_in_place(partial, directory, record)

    return Saving(directory, written, finish)


def load(directory: pathlib.Path, contents: Contents, record: CheckpointRecord, say: Say) -> None:
    """Read a checkpoint into the models and the optimizer, and restore the random state; collective over ranks.

    Says what it lacks. Raises MisfitError for one of another model; PyTorch's readers raise anything.
    """
    available = FileSystemReader(directory).read_metadata().state_dict_metadata
    contents = _present(directory, contents, available, say)
    if contents.old_policies is not None:
        contents.old_policies.make_room(record.old_versions)
    tensors = _tensors(contents)
    random_key = _random_key()
    if not _is_there(random_key, available):
        del tensors[random_key]  # written by fewer ranks
    for (model, _), trained in contents.trained().items():
        _check_fit(directory, tensors[model], model, available, trained.trained_only)
    state_dict_loader.load(tensors, checkpoint_id=directory)
    for (model, optimizer), trained in contents.trained().items():
        trained.model.load_state_dict(tensors[model], strict=not trained.trained_only)
        if trained.optimizer is not None:
            options = [{**group, "params": []} for group in trained.optimizer.param_groups]
            set_optimizer_state_dict(trained.model, trained.optimizer, tensors[optimizer])
            for group, configured in zip(trained.optimizer.param_groups, options, strict=True):
                group.update({**configured, "params": group["params"]})  # a changed decay or epsilon applies
    if contents.reference is not None:
        contents.reference.load_state_dict(tensors["reference"])
    if random_key in tensors:
        set_random_state(tensors[random_key])


def _is_there(name: str, available: Mapping[str, Any]) -> bool:
    return any(key.startswith(f"{name}.") for key in available)


def _present(directory: pathlib.Path, contents: Contents, available: Mapping[str, Any], say: Say) -> Contents:
    """The part of `contents` that a checkpoint has; says what it lacks."""
    if contents.critic is not None and not _is_there("critic", available):
        say(f"{directory} has no critic; it starts from critic_load")
        contents = dataclasses.replace(contents, critic=None)
    if contents.reference is not None and not _is_there("reference", available):
        say(f"{directory} has no reference; it starts from ref_load")
        contents = dataclasses.replace(contents, reference=None)
    policy, critic = contents.policy, contents.critic
    if policy.optimizer is not None and not _is_there("optimizer", available):
        say(f"{directory} has no optimizer state; the optimizer starts afresh, with the weights of the checkpoint")
        policy = dataclasses.replace(policy, optimizer=None)
    if critic is not None and critic.optimizer is not None and not _is_there("critic_optimizer", available):
        say(f"{directory} has no optimizer state of the critic; its optimizer starts afresh")
        critic = dataclasses.replace(critic, optimizer=None)
    return dataclasses.replace(contents, policy=policy, critic=critic)


def _check_fit(
    directory: pathlib.Path,
    tensors: Mapping[str, torch.Tensor],
    model: str,
    available: Mapping[str, Any],
    some: bool,
) -> None:
    """Raise MisfitError unless a checkpoint has these tensors in these shapes, and no others unless `some`."""
    saved = {key.removeprefix(f"{model}."): each for key, each in available.items() if key.startswith(f"{model}.")}
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shapes = {name: tuple(each.size) if hasattr(each, "size") else None for name, each in saved.items()}
    lacks, extra = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    others = sorted(name for name in expected.keys() & shapes.keys() if expected[name] != shapes[name])
    words = [
        *(f"{name} has shape {shapes[name]} in it and {expected[name]} in the model" for name in others[:1]),
        *([f"it lacks {lacks[0]} and {len(lacks) - 1} more"] if lacks else []),
        *([f"it has {extra[0]} and {len(extra) - 1} more"] if extra and not some else []),
    ]
    if words:
        raise MisfitError(
            f"{directory} is of another {model} than this run's: {'; '.join(words)}; resume with the hf_checkpoint "
            "and the adapter settings that it was saved under"
        )


def _tensors(contents: Contents) -> dict[str, Any]:
    tensors: dict[str, Any] = {_random_key(): random_state()}
    for (model, optimizer), trained in contents.trained().items():
        tensors[model] = trained.state()
        if trained.optimizer is not None:
            make_state(trained.optimizer)
            tensors[optimizer] = get_optimizer_state_dict(trained.model, trained.optimizer)
    if contents.reference is not None:
        tensors["reference"] = contents.reference.state_dict()
    if contents.old_policies is not None:
        weights = dict(named_weights(contents.policy.model))
        for version, copy in contents.old_policies.copies.items():
            tensors[f"old_actor_{version}"] = {name: _like(weights[name], part) for name, part in copy.tensors.items()}
    return tensors


def _like(weight: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that is sharded as `weight` is, without copying it."""
    if not isinstance(weight, DTensor):
        return part
    # DTensor.from_local would copy a part in host memory to the GPU, and loading would fill that copy.
    return DTensor(part, weight._spec, requires_grad=False)  # type: ignore[no-untyped-call]


def _random_key() -> str:
    return f"random_{dist.get_rank()}"
