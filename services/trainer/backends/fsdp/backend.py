"""The FSDP backend: model, optimizer, training step and checkpoints behind the `TrainerBackend` Protocol."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from miles.precision.of_run import export_recipe, rollout_recipe
from miles.precision.recipe import Recipe
from miles.rpc.gen import policy_pb2
from miles.services.trainer.backends.base import BaseBackend, LoadedParts
from miles.services.trainer.backends.fsdp import checkpoint
from miles.services.trainer.backends.fsdp.export import gathered, local_tensor, shards
from miles.services.trainer.backends.fsdp.learner import FsdpLearner
from miles.services.trainer.backends.fsdp.lora.adapter import merged_weights
from miles.services.trainer.backends.fsdp.lora.layers import named_adapters
from miles.services.trainer.backends.fsdp.model.build_roles import FsdpRoles, build_roles
from miles.services.trainer.backends.fsdp.model.matrix_inputs import matrix_inputs
from miles.services.trainer.backends.fsdp.model.sharded_model import free_gathered, full_tensor, named_weights
from miles.services.trainer.backends.fsdp.optimizer import state_tensors
from miles.services.trainer.backends.fsdp.step import FsdpTrainer
from miles.services.trainer.backends.parking import Held
from miles.services.trainer.changes.export import ChangedExports
from miles.services.trainer.checkpoint.background_save import Saving, on_first_rank
from miles.services.trainer.checkpoint.hf_files import write_hf_checkpoint
from miles.services.trainer.checkpoint.record import CheckpointRecord, check_base
from miles.services.trainer.checkpoint.state import TrainerState
from miles.services.trainer.step import algorithm_options
from miles.services.trainer.step.precision_metrics import Inputs
from miles.weights.naming.published import PublishedTensors, published_tensors, refuse_misfits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from miles.config import JobConfig


Layout = Sequence[tuple[str, torch.dtype, tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class _Parts(LoadedParts):
    roles: FsdpRoles
    trainer: FsdpTrainer
    published: PublishedTensors
    layout: Layout
    """Of an export, in its order."""
    changed: ChangedExports = dataclasses.field(default_factory=ChangedExports)

    @property
    def policy(self) -> PreTrainedModel:
        return self.roles.policy.model


class FsdpBackend(BaseBackend[_Parts]):
    """Trains a Hugging Face model that is sharded over all ranks of the default process group.

    With `lora_rank` the policy is a frozen base and an adapter, and `export` yields the adapter alone.
    """

    def __init__(self, config: JobConfig, checkpoint_dir: pathlib.Path, device: torch.device) -> None:
        """See `BaseBackend`."""
        super().__init__(config, checkpoint_dir, device)
        self._save_group: dist.ProcessGroup | None = None
        """Over all ranks, for a thread that writes a checkpoint."""

    @property
    def lora(self) -> policy_pb2.LoraAdapter | None:
        """See `TrainerBackend.lora`."""
        adapter = self._loaded.roles.adapter
        return None if adapter is None else adapter.described

    def new_bucket(self, nbytes: int) -> torch.Tensor:
        """Memory for a bucket of an export, uint8 (nbytes,)."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def export_layout(self) -> Layout:
        """See `TrainerBackend.export_layout`."""
        return self._loaded.layout

    def _build(self) -> _Parts:
        published = published_tensors(self._config)  # first: it refuses a model before anything is loaded
        roles = build_roles(self._config, self._device)
        trainer = FsdpTrainer(self._config, roles, roles.routing, self._device)
        policy = roles.policy.model
        exported = (
            named_adapters(policy)
            if roles.adapter is not None
            else published.from_module(_empty(named_weights(policy)))
        )
        layout = [(name, self._dtype_of(published, name, t.dtype), tuple(t.shape)) for name, t in exported]
        if roles.adapter is None:
            refuse_misfits(published, {name: shape for name, _, shape in layout}, "the model has")
        return _Parts(roles, trainer, published, layout)

    def _input_modules(self, recipe: Recipe) -> Inputs:
        return matrix_inputs(self._loaded.policy, recipe)

    def _export(self) -> Iterator[tuple[str, torch.Tensor]]:
        parts = self._loaded
        if parts.roles.adapter is not None:
            return self._gathered(named_adapters(parts.policy))
        weights = named_weights(parts.policy)
        if dist.get_world_size() == 1 and rollout_recipe(self._config) is None:
            # Nothing to gather, and transports convert while they copy: many tensors at once.
            return parts.published.from_module((name, local_tensor(weight)) for name, weight in weights)
        return parts.published.from_module(self._gathered(weights))

    def _export_to_first(self) -> Iterator[tuple[str, torch.Tensor]]:
        parts, buffer_size = self._loaded, self._config.weights.update_weight_buffer_size
        dtype_of = functools.partial(self._dtype_of, parts.published)

        def weights() -> Iterable[tuple[str, torch.Tensor]]:
            return named_weights(parts.policy) if parts.roles.adapter is None else named_adapters(parts.policy)

        full = parts.changed.export(lambda: shards(weights(), dtype_of), lambda: self._gathered(weights()), buffer_size)
        return parts.published.from_module(full) if parts.roles.adapter is None else full

    def _gathered(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        dtype_of = functools.partial(self._dtype_of, self._loaded.published)
        return gathered(weights, dtype_of, self._config.weights.update_weight_buffer_size, self.new_bucket)

    def _dtype_of(self, published: PublishedTensors, name: str, held: torch.dtype) -> torch.dtype:
        return published.model.exported_dtype(name, held, self._export_dtype)

    @property
    def _export_dtype(self) -> torch.dtype:
        """The type in which weights are exported."""
        return algorithm_options.DTYPES[self._config.rollout.rollout_dtype]

    def _save(self, directory: pathlib.Path, record: CheckpointRecord) -> None:
        checkpoint.save(directory, self._contents(), record)

    def _begin_save(self, directory: pathlib.Path, record: CheckpointRecord) -> Saving:
        if self._save_group is None:
            self._save_group = dist.new_group(backend="gloo")
        return checkpoint.begin(directory, self._contents(), record, self._save_group)

    def _load_checkpoint(self, directory: pathlib.Path, record: CheckpointRecord) -> None:
        served = "" if self.lora is None else self.lora.base_checksum.hex()  # what older checkpoints call the base
        check_base(directory, record, self._base, served)
        checkpoint.load(directory, self._contents(), record, self._say)
        roles = self._loaded.roles
        roles.policy.loss_scale.value, roles.policy.loss_scale.good_steps = record.loss_scale, record.good_steps
        if roles.critic is not None and record.critic_iteration:
            roles.critic.loss_scale.value = record.critic_loss_scale
            roles.critic.loss_scale.good_steps = record.critic_good_steps

    def _write_hf(self, directory: pathlib.Path) -> None:
        """Merge an adapter in, and also write it by itself, in PEFT's form and in float32, to the folder `adapter`."""
        policy, adapter, tensors = self._loaded.policy, self._loaded.roles.adapter, self._loaded.published.model
        full = self._gathered(named_weights(policy)) if adapter is None else merged_weights(policy, self._gathered)
        source, dtype = pathlib.Path(str(self._config.rollout.hf_checkpoint)), self._export_dtype
        full = tensors.conversion.to_checkpoint(full)
        recipe, template = export_recipe(self._config), self._chat_template
        write_hf_checkpoint(directory, source, tensors, full, dtype, recipe=recipe, chat_template=template)
        adapters = {} if adapter is None else {name: full_tensor(part) for name, part in named_adapters(policy)}
        if adapter is not None:
            on_first_rank(functools.partial(adapter.write, directory / "adapter", adapters))

    def _held(self, parts: _Parts) -> Held:
        def kept() -> Iterator[torch.Tensor]:
            for model in parts.roles.models:
                yield from (local_tensor(tensor) for tensor in (*model.parameters(), *model.buffers()))
            for optimizer in parts.roles.optimizers:
                yield from (local_tensor(tensor) for tensor in state_tensors(optimizer))

        return Held(kept)

    def _before_release(self, parts: _Parts) -> None:
        for model in parts.roles.models:
            free_gathered(model)

    def _destroy_groups(self) -> None:
        if self._save_group is not None:
            dist.destroy_process_group(self._save_group)
        self._save_group = None

    def _recording_replica(self) -> int | None:
        return dist.get_rank()

    def _record_of(self, state: TrainerState) -> CheckpointRecord:
        roles = self._loaded.roles
        scale, critic = roles.policy.loss_scale, roles.critic
        record = dataclasses.replace(
            super()._record_of(state), loss_scale=scale.value, good_steps=scale.good_steps, base=self._base
        )
        if critic is None:
            return record
        return dataclasses.replace(
            record, critic_loss_scale=critic.loss_scale.value, critic_good_steps=critic.loss_scale.good_steps
        )

    def _contents(self) -> checkpoint.Contents:
        config, roles = self._config, self._loaded.roles

        def trained(learner: FsdpLearner[Any]) -> checkpoint.Trained:
            optimizer = None if config.checkpoint.no_save_optim else learner.optimizer
            adapted = learner is roles.policy and roles.adapter is not None
            return checkpoint.Trained(learner.model, optimizer, trained_only=adapted)

        return checkpoint.Contents(
            policy=trained(roles.policy),
            critic=None if roles.critic is None else trained(roles.critic),
            reference=roles.reference.model if roles.reference is not None and self._reference_moves else None,
            old_policies=roles.old_policies,
        )

    @property
    def _base(self) -> str:
        """Identity of the weights that an adapter is trained on; empty when all of the policy is trained."""
        adapter = self._loaded.roles.adapter
        return "" if adapter is None else adapter.identity


def _empty(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors like these without memory, and unsharded."""
    return ((name, torch.empty(weight.shape, dtype=weight.dtype, device="meta")) for name, weight in weights)
