"""The Megatron-Core backend: model, optimizer, training step and checkpoints behind the `TrainerBackend` Protocol."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import torch

from miles.services.trainer.backends.base import BaseBackend, LoadedParts
from miles.services.trainer.backends.megatron.changed_parameters import ChangedParameters
from miles.services.trainer.backends.megatron.checkpoint import torch_dist
from miles.services.trainer.backends.megatron.export import Exporter
from miles.services.trainer.backends.megatron.model.build_roles import MegatronRoles, build_roles
from miles.services.trainer.backends.megatron.parallel import groups
from miles.services.trainer.backends.megatron.step import MegatronTrainer
from miles.services.trainer.backends.parking import Held
from miles.services.trainer.checkpoint.background_save import Saving
from miles.services.trainer.checkpoint.hf_files import write_hf_checkpoint
from miles.services.trainer.checkpoint.record import CheckpointRecord
from miles.services.trainer.step import algorithm_options
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
    changed: ChangedParameters = dataclasses.field(default_factory=ChangedParameters)


class MegatronBackend(BaseBackend[_Parts]):
    """Trains a model in Megatron-Core, spread over all ranks of the default process group by the configured layout.

    What `export` yields is complete on every rank.
    """

    lora = None
    """It trains no adapters."""

    def export_layout(self) -> Layout:
        """See `TrainerBackend.export_layout`."""
        return self._loaded.layout

    def _build(self) -> _Parts:
        config = self._config
        published = published_tensors(config)  # first: it refuses a model before anything is loaded
        parallel = groups.initialize(config)
        roles = build_roles(config, parallel, self._device)
        exporter = Exporter(roles.policy.model, published.model, algorithm_options.DTYPES[config.rollout.rollout_dtype])
        layout = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in _published(exporter, published)]
        refuse_misfits(published, {name: shape for name, _, shape in layout}, "megatron-bridge exports")
        trainer = MegatronTrainer(config, roles, parallel, roles.routing, self._device)
        return _Parts(roles, trainer, parallel, exporter, published, layout)

    def _export(self) -> Iterator[tuple[str, torch.Tensor]]:
        return _published(self._loaded.exporter, self._loaded.published)

    def _export_to_first(self) -> Iterator[tuple[str, torch.Tensor]]:
        parts = self._loaded
        tasks = parts.exporter.tasks(mtp=parts.published.contract.mtp)
        return parts.published.from_checkpoint(parts.changed.export(tasks, parts.exporter.gathered))

    def _save(self, directory: pathlib.Path, record: CheckpointRecord) -> None:
        torch_dist.save(directory, self._contents(), record)

    def _begin_save(self, directory: pathlib.Path, record: CheckpointRecord) -> Saving:
        return torch_dist.begin(directory, self._contents(), record)

    def _load_checkpoint(self, directory: pathlib.Path, record: CheckpointRecord) -> None:
        torch_dist.load(directory, self._contents(), record, self._say)

    def _write_hf(self, directory: pathlib.Path) -> None:
        parts, rollout = self._loaded, self._config.rollout
        source, dtype = pathlib.Path(str(rollout.hf_checkpoint)), algorithm_options.DTYPES[rollout.rollout_dtype]
        model, tensors = parts.published.model, parts.exporter.tensors()
        write_hf_checkpoint(directory, source, model, tensors, dtype, chat_template=self._chat_template)

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

    def _contents(self) -> torch_dist.Contents:
        roles = self._loaded.roles
        saves_optimizers = not self._config.checkpoint.no_save_optim
        return torch_dist.Contents(
            model=roles.policy.model,
            optimizer=roles.policy.optimizer.inner if saves_optimizers else None,
            reference=roles.reference.copy if roles.reference is not None and self._reference_moves else None,
            old_policies=roles.old_policies,
            critic=None if roles.critic is None else roles.critic.model,
            critic_optimizer=roles.critic.optimizer.inner if roles.critic is not None and saves_optimizers else None,
        )


def _published(exporter: Exporter, published: PublishedTensors) -> Iterator[tuple[str, torch.Tensor]]:
    return published.from_checkpoint(exporter.tensors(mtp=published.contract.mtp))
