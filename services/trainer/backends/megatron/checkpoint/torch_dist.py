"""Checkpoints in Megatron-Core's torch_dist format, which any layout can read, beside the trainer's record.

DIR/step_00000012/          appears by rename, once everything in it is on disk
    .metadata, common.pt, *.distcp      parameters, optimizer state
    trainer.json                        as for every backend
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

from miles.services.trainer.backends.megatron.checkpoint import optimizer_state
from miles.services.trainer.backends.megatron.model.build_model import MegatronModel
from miles.services.trainer.checkpoint.background_save import (
    Saving,
    empty_folder,
    in_thread,
    put_in_place,
)
from miles.services.trainer.checkpoint.choice import Say
from miles.services.trainer.checkpoint.record import CheckpointRecord
from miles.services.trainer.step.old_policies import OldPolicies
from miles.services.trainer.step.weight_copy import WeightCopy

_OPTIONAL = ("optimizer", "critic_optimizer", "reference", "critic")
"""Contents that a checkpoint may lack."""
_CRITIC_PREFIX = "critic."
"""Prefix of the names of its tensors."""


@dataclasses.dataclass(frozen=True, slots=True)
class Contents:
    """Everything whose tensors are saved."""

    model: MegatronModel
    optimizer: Any | None
    """megatron.core's; None to leave its state out."""
    reference: WeightCopy | None
    """None unless it changes during the run."""
    critic: MegatronModel | None = None
    critic_optimizer: Any | None = None
    old_policies: OldPolicies | None = None


def save(directory: pathlib.Path, contents: Contents, record: CheckpointRecord) -> None:
    """Write a checkpoint to `directory`, replacing one of the same name; collective over ranks.

    A crash at any moment leaves no folder of that name, the old one, or the complete new one.
    """
    from megatron.core import dist_checkpointing

    partial = empty_folder(directory)
    tensors, metadata = _tensors(contents), _metadata(contents)
    dist_checkpointing.save(tensors, str(partial), content_metadata=metadata)
    put_in_place(partial, directory, record)


def begin(directory: pathlib.Path, contents: Contents, record: CheckpointRecord) -> Saving:
    """As `save`, with a thread that writes copies of the tensors in host memory; collective over ranks."""
    from megatron.core import dist_checkpointing

    partial = empty_folder(directory)
    request = dist_checkpointing.save(
        _tensors(contents),
        str(partial),
        content_metadata=_metadata(contents),
        async_sharded_save=True,
        async_strategy="mcore",
    )

    def finish() -> None:
        for finalize in request.finalize_fns:
            finalize()
        put_in_place(partial, directory, record)

    return Saving(directory, in_thread(_writer(request)), finish)


def _writer(request: Any) -> Callable[[], None]:
    """A function that writes this rank's files from copies of its tensors in host memory."""
    if request.async_fn is None:
        return lambda: None
    rank, buckets, results = request.async_fn_args
    on_host = [tensor.is_cpu for _, _, (_, tensors) in buckets for _, tensor in tensors]
    staged = request.preload_fn()
    if all(on_host):  # staging left them where they are
        staged = [
            (file, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
            for file, key, (data, tensors) in staged
        ]
    return functools.partial(request.async_fn, rank, staged, results, **request.async_fn_kwargs)


def _metadata(contents: Contents) -> dict[str, Any]:
    kinds: dict[str, Any] = {kind: getattr(contents, kind) is not None for kind in _OPTIONAL}
    prefix = {} if contents.optimizer is None else {"master_prefix": optimizer_state.master_prefix(contents.optimizer)}
    return {**optimizer_state.CONTENT, **kinds, **prefix}


def load(directory: pathlib.Path, contents: Contents, record: CheckpointRecord, say: Say) -> None:
    """Read a checkpoint, of any layout, into the model and the optimizer; collective over ranks.

    Says what it lacks. Readers of Megatron-Core and PyTorch raise anything.
    """
    from megatron.core import dist_checkpointing

    kinds = dist_checkpointing.load_content_metadata(str(directory)) or {}
    if contents.critic is not None and not kinds.get("critic"):
        say(f"{directory} has no critic; it starts from critic_load")
    if contents.reference is not None and not kinds.get("reference"):
        say(f"{directory} has no reference; it starts from ref_load")
    if contents.optimizer is not None and not kinds.get("optimizer"):
        say(f"{directory} has no optimizer state; the optimizer starts afresh, with the weights of the checkpoint")
    if contents.critic_optimizer is not None and kinds.get("critic") and not kinds.get("critic_optimizer"):
        say(f"{directory} has no optimizer state of the critic; its optimizer starts afresh")
    absent: dict[str, Any] = dict.fromkeys(kind for kind in _OPTIONAL if not kinds.get(kind))
    if contents.old_policies is not None:
        contents.old_policies.make_room(record.old_versions)
    _load_into(directory, dataclasses.replace(contents, **absent), contents, kinds.get("master_prefix", ""))


def _load_into(directory: pathlib.Path, saved: Contents, contents: Contents, master_prefix: str) -> None:
    """Read what the checkpoint has; `contents` may have more."""
    from megatron.core import dist_checkpointing

    tensors = _tensors(dataclasses.replace(saved, optimizer=None, critic_optimizer=None))
    loaded = dist_checkpointing.load(tensors, str(directory))
    _load_model(saved.model, loaded, "model")
    if copies := _copies(saved):
        own = WeightCopy(saved.model.parameters)  # what was loaded lies in the model's own memory
        for name, weights in copies.items():
            _load_model(saved.model, loaded, name)
            weights.take()
        own.put()
    if saved.critic is not None:
        _load_model(saved.critic, loaded, "critic")
    for name, model in (("optimizer", saved.model), ("critic_optimizer", saved.critic)):
        if model is not None and getattr(saved, name) is not None:
            _load_optimizer(directory, name, model, getattr(saved, name), master_prefix)
        elif getattr(contents, name) is not None:
            getattr(contents, name).reload_model_params()  # its own copy in float32


def _load_optimizer(
    directory: pathlib.Path, name: str, model: MegatronModel, optimizer: Any, master_prefix: str
) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

    prefix = _CRITIC_PREFIX if name == "critic_optimizer" else ""
    state = optimizer_state.sharded_state(optimizer, _sharded_model(model, "model"), loading=True)
    optimizer_state.rename(state, optimizer_state.master_prefix(optimizer), master_prefix)
    add_prefix_for_sharding(state, prefix)
    loaded = dist_checkpointing.load({name: state}, str(directory))
    optimizer_state.restore(optimizer, loaded[name])
    if master_prefix and not optimizer_state.master_prefix(optimizer):
        _load_masters(directory, model, prefix + master_prefix)


def _load_masters(directory: pathlib.Path, model: MegatronModel, prefix: str) -> None:
    """Read the float32 parameters of a 16-bit run, whose own parameters are rounded; collective."""
    from megatron.core import dist_checkpointing

    sharded = _sharded_model(model, "model")
    trained = {name for chunk in model.bare_chunks for name, weight in chunk.named_parameters() if weight.requires_grad}
    masters = {
        chunk: {
            name: dataclasses.replace(part, key=prefix + part.key) for name, part in state.items() if name in trained
        }
        for chunk, state in sharded.items()
    }
    _load_model(model, dist_checkpointing.load(masters, str(directory)), "model")


def _tensors(contents: Contents) -> dict[str, Any]:
    tensors = _sharded_model(contents.model, "model")
    if contents.optimizer is not None:
        tensors["optimizer"] = optimizer_state.sharded_state(contents.optimizer, tensors, loading=False)
    for name, weights in _copies(contents).items():
        tensors |= _sharded_copy(contents.model, weights, name)
    if contents.critic is not None:
        tensors |= _sharded_critic(contents.critic, contents.critic_optimizer)
    return tensors


def _sharded_critic(critic: MegatronModel, optimizer: Any | None) -> dict[str, Any]:
    """The critic's tensors, under keys of the critic."""
    from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

    sharded = _sharded_model(critic, "critic")
    if optimizer is not None:
        sharded["critic_optimizer"] = optimizer_state.sharded_state(optimizer, sharded, loading=False)
    add_prefix_for_sharding(sharded, _CRITIC_PREFIX)
    return sharded


def _sharded_model(model: MegatronModel, name: str) -> dict[str, Any]:
    """By chunk: model, or model0, model1, … with virtual stages. The tensors' own keys are global."""
    chunks = model.bare_chunks
    keys = [name] if len(chunks) == 1 else [f"{name}{i}" for i in range(len(chunks))]
    return {key: chunk.sharded_state_dict() for key, chunk in zip(keys, chunks, strict=True)}


def _copies(contents: Contents) -> dict[str, WeightCopy]:
    """Copies of weights by the name under which they are saved."""
    old = {} if contents.old_policies is None else contents.old_policies.copies
    copies = {f"old_actor_{version}_": copy for version, copy in old.items()}
    return copies if contents.reference is None else copies | {"reference": contents.reference}


def _sharded_copy(model: MegatronModel, weights: WeightCopy, name: str) -> dict[str, Any]:
    """A copy's tensors, under keys of the copy, in the layout of the model."""
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
