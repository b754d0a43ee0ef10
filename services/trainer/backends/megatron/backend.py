"""The Megatron-Core backend: model, optimizer, training step and checkpoints behind the `TrainerBackend` Protocol."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from miles.precision.of_run import export_recipe
from miles.precision.recipe import Recipe
from miles.rpc.gen import policy_pb2
from miles.services.trainer.backends.base import BaseBackend, LoadedParts
from miles.services.trainer.backends.megatron.changed_parameters import ChangedParameters
from miles.services.trainer.backends.megatron.checkpoint import torch_dist
from miles.services.trainer.backends.megatron.export import Exporter
from miles.services.trainer.backends.megatron.lora.adapter import Adapter, describe
from miles.services.trainer.backends.megatron.model.build_roles import MegatronRoles, build_roles
from miles.services.trainer.backends.megatron.model.matrix_inputs import matrix_inputs
from miles.services.trainer.backends.megatron.parallel import groups
from miles.services.trainer.backends.megatron.precision import kernels
from miles.services.trainer.backends.megatron.precision.choice import low_precision
from miles.services.trainer.backends.megatron.precision.covered import differences
from miles.services.trainer.backends.megatron.step import MegatronTrainer
from miles.services.trainer.backends.parking import Held
from miles.services.trainer.checkpoint.background_save import Saving
from miles.services.trainer.checkpoint.hf_files import write_hf_checkpoint
from miles.services.trainer.checkpoint.record import CheckpointRecord, check_base
from miles.services.trainer.checkpoint.state import TrainerState
from miles.services.trainer.step import algorithm_options
from miles.services.trainer.step.precision_metrics import Inputs
from miles.services.trainer.step.weight_copy import CopiedRole
from miles.weights.naming.published import PublishedTensors, published_tensors, refuse_misfits

Layout = Sequence[tuple[str, torch.dtype, tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class _Parts(LoadedParts):
    roles: MegatronRoles
    trainer: MegatronTrainer
    parallel: groups.ParallelRank
    exporter: Exporter
    published: PublishedTensors
    layout: Layout
    """Of an export, in its order."""
    adapter: Adapter | None = None
    """With lora_rank, what is trained and exported in place of the weights."""
    changed: ChangedParameters = dataclasses.field(default_factory=ChangedParameters)


class MegatronBackend(BaseBackend[_Parts]):
    """Trains a model in Megatron-Core, spread over all ranks of the default process group by the configured layout.

    What `export` yields is complete on every rank. With `lora_rank` that is the adapter alone.
    """

    @property
    def lora(self) -> policy_pb2.LoraAdapter | None:
        """See `TrainerBackend.lora`."""
        adapter = self._loaded.adapter
        return None if adapter is None else adapter.described

    def export_layout(self) -> Layout:
        """See `TrainerBackend.export_layout`."""
        return self._loaded.layout

    def _build(self) -> _Parts:
        config = self._config
        published = published_tensors(config)  # first: it refuses a model before anything is loaded
        parallel = groups.initialize(config)
        roles = build_roles(config, parallel, self._device)
        if config.moe.moe_grouped_gemm and not roles.policy.model.config.moe_grouped_gemm:
            self._say("moe_grouped_gemm changes nothing: without TransformerEngine experts are computed one by one")
        dtype = algorithm_options.DTYPES[config.rollout.rollout_dtype]
        exporter = Exporter(roles.policy.model, published.model, dtype)
        if (low := low_precision(config)) is not None:
            for note in differences(low, roles.policy.model.config, exporter.tasks(mtp=True)):
                self._say(note)
        layout = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in _published(exporter, published)]
        refuse_misfits(published, {name: shape for name, _, shape in layout}, "megatron-bridge exports")
        adapter = None
        if config.lora.lora_rank:
            base = functools.partial(_module_form, exporter, published)
            adapter = describe(roles.policy.model, config.lora, base, dtype)
            layout = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in adapter.tensors()]
        trainer = MegatronTrainer(config, roles, parallel, roles.routing, self._device)
        return _Parts(roles, trainer, parallel, exporter, published, layout, adapter)

    def _input_modules(self, recipe: Recipe) -> Inputs:
        parts = self._loaded
        return matrix_inputs(recipe, parts.roles.policy.model.config, parts.exporter.tasks(mtp=False))

    def _export(self) -> Iterator[tuple[str, torch.Tensor]]:
        parts = self._loaded
        return _published(parts.exporter, parts.published) if parts.adapter is None else parts.adapter.tensors()

    def _export_to_first(self) -> Iterator[tuple[str, torch.Tensor]]:
        parts = self._loaded
        if parts.adapter is not None:
            full = parts.adapter.tensors()
            return ((name, tensor.to("cpu", copy=True)) for name, tensor in full if dist.get_rank() == 0)
        tasks = parts.exporter.tasks(mtp=parts.published.contract.mtp)
        return parts.published.from_checkpoint(parts.changed.export(tasks, parts.exporter.gathered))

    def _save(self, directory: pathlib.Path, record: CheckpointRecord) -> None:
        torch_dist.save(directory, self._contents(), record)

    def _begin_save(self, directory: pathlib.Path, record: CheckpointRecord) -> Saving:
        return torch_dist.begin(directory, self._contents(), record)

    def _load_checkpoint(self, directory: pathlib.Path, record: CheckpointRecord) -> None:
        check_base(directory, record, self._base, "")
        torch_dist.load(directory, self._contents(), record, self._say)

    def _write_hf(self, directory: pathlib.Path) -> None:
        parts, rollout = self._loaded, self._config.rollout
        source, dtype = pathlib.Path(str(rollout.hf_checkpoint)), algorithm_options.DTYPES[rollout.rollout_dtype]
        model, tensors = parts.published.model, parts.exporter.tensors()
        if parts.adapter is not None:
            tensors = parts.adapter.merged(tensors)
        recipe, template = export_recipe(self._config), self._chat_template
        write_hf_checkpoint(directory, source, model, tensors, dtype, recipe=recipe, chat_template=template)
        if parts.adapter is not None:
            parts.adapter.write(directory / "adapter", str(source))

    def _before_release(self, parts: _Parts) -> None:
        kernels.drop_copies(parts.roles.policy.model.bare_chunks)

    def _held(self, parts: _Parts) -> Held:
        learners = [learner for learner in (parts.roles.policy, parts.roles.critic) if learner is not None]

        def kept() -> Iterator[torch.Tensor]:
            for learner in learners:
                for chunk in learner.model.bare_chunks:
                    yield from (*chunk.parameters(), *chunk.buffers())
                yield from learner.optimizer.tensors()

        def scratch() -> Iterator[torch.Tensor]:
            for learner in learners:
                yield from learner.model.gradient_buffers()

        return Held(kept, scratch)

    def _destroy_groups(self) -> None:
        groups.destroy()

    def _recording_replica(self) -> int | None:
        parallel = self._loaded.parallel
        records = parallel.tensor_rank == parallel.context_rank == 0 and parallel.is_last_stage
        return parallel.data.rank if records else None

    def _record_of(self, state: TrainerState) -> CheckpointRecord:
        return dataclasses.replace(super()._record_of(state), base=self._base)

    @property
    def _base(self) -> str:
        """Identity of the weights that an adapter is trained on; empty when all of the policy is trained."""
        adapter = self._loaded.adapter
        return "" if adapter is None else adapter.identity

    def _contents(self) -> torch_dist.Contents:
        roles = self._loaded.roles
        saves_optimizers = not self._config.checkpoint.no_save_optim
        return torch_dist.Contents(
            model=roles.policy.model,
            optimizer=roles.policy.optimizer.inner if saves_optimizers else None,
            reference=roles.reference.copy
            if isinstance(roles.reference, CopiedRole) and self._reference_moves
            else None,
            old_policies=roles.old_policies,
            critic=None if roles.critic is None else roles.critic.model,
            critic_optimizer=roles.critic.optimizer.inner if roles.critic is not None and saves_optimizers else None,
        )


def _published(exporter: Exporter, published: PublishedTensors) -> Iterator[tuple[str, torch.Tensor]]:
    return published.from_checkpoint(exporter.tensors(mtp=published.contract.mtp))


def _module_form(exporter: Exporter, published: PublishedTensors) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights as engines read them from the folder."""
    return published.model.conversion.to_module(exporter.tensors(mtp=False))
