"""Checkpoints in Megatron-Core's torch_dist format, which any layout can read, beside the trainer's record.

DIR/step_00000012/          appears by rename, once everything in it is on disk
    .metadata, common.pt, *.distcp      parameters, optimizer state
    trainer.json                        as for every backend
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import pathlib
import shutil
from typing import Any

import torch
import torch.distributed as dist

from miles.services.trainer.backends.megatron.model import MegatronModel
from miles.services.trainer.checkpoint_record import Record, complete, read_record
from miles.services.trainer.old_actors import OldActors
from miles.services.trainer.weight_copy import WeightCopy

_CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


_OPTIMIZERS = ("optimizer", "critic_optimizer")
_OPTIONAL = (*_OPTIMIZERS, "reference", "critic")
"""Contents that a checkpoint may lack."""
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Contents:
    """What has tensors to save."""

    model: MegatronModel
    optimizer: Any | None
    """megatron.core's; None to leave its state out."""
    reference: WeightCopy | None
    """None unless it changes during the run."""
    critic: MegatronModel | None = None
    critic_optimizer: Any | None = None
    old_actors: OldActors | None = None


def save(directory: pathlib.Path, contents: Contents, record: Record) -> None:
    """Write a checkpoint to `directory`, replacing one of the same name; collective over ranks.

    A crash at any moment leaves either no folder of that name, or the old one, or the new one whole.
    """
    from megatron.core import dist_checkpointing

    partial = directory.with_name(directory.name + ".tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    kinds = {kind: getattr(contents, kind) is not None for kind in _OPTIONAL}
    dist_checkpointing.save(_tensors(contents, loading=False), str(partial), content_metadata={**_CONTENT, **kinds})
    dist.barrier()
    if dist.get_rank() == 0:
        complete(partial, directory, record)
    dist.barrier()


def load(directory: pathlib.Path, contents: Contents) -> Record:
    """Read a checkpoint, of any layout, into the model and the optimizer; collective over ranks.

    Raises FileNotFoundError when it is incomplete and ValueError when it is none of this backend.
    """
    from megatron.core import dist_checkpointing

    record = read_record(directory)
    if not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
        raise ValueError(f"{directory} is not a checkpoint of the megatron backend; name another folder in load")
    kinds = dist_checkpointing.load_content_metadata(str(directory)) or {}
    if contents.critic is not None and not kinds.get("critic"):
        logger.warning("%s has no critic; it starts from critic_load", directory)
    absent: dict[str, Any] = dict.fromkeys(kind for kind in _OPTIONAL if not kinds.get(kind))
    return _load_into(directory, dataclasses.replace(contents, **absent), contents, record)


def _load_into(directory: pathlib.Path, saved: Contents, contents: Contents, record: Record) -> Record:
    """Read what the checkpoint has; `contents` may have more."""
    from megatron.core import dist_checkpointing

    if saved.old_actors is not None:
        saved.old_actors.make_room(record.old_versions)
    for each in (saved.optimizer, saved.critic_optimizer):
        if each is not None:
            _make_states(each)
    tensors = _tensors(saved, loading=True)
    groups = {name: _groups_of(tensors[name]) for name in _OPTIMIZERS if name in tensors}
    loaded = dist_checkpointing.load(tensors, str(directory))
    for name, weights in _copies(saved).items():
        _load_model(saved.model, loaded, name)
        weights.take()
    _load_model(saved.model, loaded, "model")
    if saved.critic is not None:
        _load_model(saved.critic, loaded, "critic")
    for name in _OPTIMIZERS:
        if getattr(saved, name) is not None:
            _load_optimizer(getattr(saved, name), groups[name], loaded[name], directory)
        elif getattr(contents, name) is not None:
            getattr(contents, name).reload_model_params()  # its own copy in float32
    return record


def _load_optimizer(optimizer: Any, groups: list[Any], state: dict[Any, Any], directory: pathlib.Path) -> None:
    """`groups` are the parameter groups of each part of the optimizer as they were before loading.

    With experts spread over ranks the optimizer has a part for them and one for the rest, else a single part. What is
    not sharded is saved by part; its only content that training changes is the number of steps, the same in all.
    """
    saved = [part for part in (state, *_parts_of(state)) if "optimizer" in part or "param_groups" in part]
    if len(saved) != len(groups):
        steps = {group["step"] for part in saved for group in _groups(part) if "step" in group}
        parts = _parts_of(state) if len(groups) > 1 else [state]
        if len(steps) > 1 or any("param_state" not in part for part in parts):
            raise ValueError(
                f"the optimizer's state in {directory} was saved with another spread of experts over ranks; resume "
                "with expert_model_parallel_size as it was, with use_distributed_optimizer, or from its save_hf folder"
            )
        for step in steps:
            for group in (group for part_groups in groups for group in part_groups):
                group["step"] = step
        rebuilt = [
            {
                "optimizer": {"param_groups": part_groups},
                "param_state": part["param_state"],
                "param_state_sharding_type": _CONTENT["distrib_optim_sharding_type"],
            }
            for part_groups, part in zip(groups, parts, strict=True)
        ]
        state = rebuilt[0] if len(rebuilt) == 1 else dict(enumerate(rebuilt))
    optimizer.load_state_dict(state)


def _parts_of(state: dict[Any, Any]) -> list[dict[Any, Any]]:
    """The numbered parts of an optimizer's state; none where it is a single one."""
    return [state[key] for key in sorted(key for key in state if isinstance(key, int))]


def _groups_of(state: dict[Any, Any]) -> list[Any]:
    """Parameter groups by part, of a state that is about to be loaded into."""
    return [copy.deepcopy(_groups(part)) for part in (_parts_of(state) or [state])]


def _groups(part: dict[Any, Any]) -> list[dict[str, Any]]:
    """Parameter groups of one part; 32-bit optimizers that are not distributed have them at the top."""
    groups: list[dict[str, Any]] = part.get("optimizer", part)["param_groups"]
    return groups


def load_weights(directory: pathlib.Path, model: MegatronModel) -> None:
    """Read only the parameters; collective."""
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load(_sharded_model(model, "model"), str(directory))
    _load_model(model, loaded, "model")


def _tensors(contents: Contents, *, loading: bool) -> dict[str, Any]:
    tensors = _sharded_model(contents.model, "model")
    if contents.optimizer is not None:
        tensors["optimizer"] = contents.optimizer.sharded_state_dict(
            dict(tensors), is_loading=loading, metadata=_CONTENT
        )
    for name, weights in _copies(contents).items():
        tensors |= _sharded_copy(contents.model, weights, name)
    if contents.critic is not None:
        tensors |= _sharded_critic(contents.critic, contents.critic_optimizer, loading=loading)
    return tensors


def _sharded_critic(critic: MegatronModel, optimizer: Any | None, *, loading: bool) -> dict[str, Any]:
    """The critic's tensors under keys of their own."""
    from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

    sharded = _sharded_model(critic, "critic")
    if optimizer is not None:
        state = optimizer.sharded_state_dict(dict(sharded), is_loading=loading, metadata=_CONTENT)
        sharded["critic_optimizer"] = state
    add_prefix_for_sharding(sharded, "critic.")
    return sharded


def _sharded_model(model: MegatronModel, name: str) -> dict[str, Any]:
    """By chunk: model, or model0, model1, … with virtual stages. The tensors' own keys are global."""
    chunks = model.bare_chunks
    keys = [name] if len(chunks) == 1 else [f"{name}{i}" for i in range(len(chunks))]
    return {key: chunk.sharded_state_dict() for key, chunk in zip(keys, chunks, strict=True)}


def _copies(contents: Contents) -> dict[str, WeightCopy]:
    """Copies of weights by the name under which they are saved."""
    old = {} if contents.old_actors is None else contents.old_actors.copies
    copies = {f"old_actor_{version}_": copy for version, copy in old.items()}
    return copies if contents.reference is None else copies | {"reference": contents.reference}


def _sharded_copy(model: MegatronModel, weights: WeightCopy, name: str) -> dict[str, Any]:
    """A copy's tensors under keys of their own, in the layout of the model."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

    own = WeightCopy(model.parameters)
    weights.put()
    sharded = _sharded_model(model, name)
    for state in sharded.values():
        for key, value in state.items():
            if isinstance(value, ShardedTensor | ShardedTensorFactory) and value.data is not None:
                state[key] = dataclasses.replace(value, data=value.data.detach().clone())
    own.put()
    add_prefix_for_sharding(sharded, f"{name}.")
    return sharded


def _load_model(model: MegatronModel, loaded: dict[str, Any], name: str) -> None:
    chunks = model.bare_chunks
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[name if len(chunks) == 1 else f"{name}{i}"], strict=False)


def _make_states(optimizer: Any) -> None:
    """PyTorch's AdamW makes its state in the first step; a checkpoint is read into a state that is there."""
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(each, "optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer):
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    zeros = torch.zeros_like(parameter.data)
                    inner.state[parameter].update(step=torch.tensor(0.0), exp_avg=zeros, exp_avg_sq=zeros.clone())
