"""The Megatron-Core backend: model, optimizer, training step and checkpoints behind the `TrainerBackend` Protocol."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import logging
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from miles.services.trainer.backends.megatron.checkpoint import torch_dist
from miles.services.trainer.backends.megatron.checkpoint.hf_files import write_hf_checkpoint
from miles.services.trainer.backends.megatron.export import Exporter
from miles.services.trainer.backends.megatron.model.build_roles import MegatronRoles, build_roles
from miles.services.trainer.backends.megatron.parallel import groups
from miles.services.trainer.backends.megatron.step import MegatronTrainer
from miles.services.trainer.batch.rollout_batch import RolloutBatch
from miles.services.trainer.checkpoint.background_save import Saving
from miles.services.trainer.checkpoint.record import Record, digest, newest
from miles.services.trainer.checkpoint.state import TrainerState
from miles.services.trainer.ranks.abandoning import Abandonment
from miles.services.trainer.step import algorithm_options
from miles.services.trainer.step.progress import Report
from miles.services.trainer.step.sample_log import SampleLog
from miles.services.trainer.step.sample_recording import recorded
from miles.types import SampleGroup

if TYPE_CHECKING:
    from miles.config import JobConfig

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class _Loaded:
    """What `load` builds."""

    place: groups.Place
    roles: MegatronRoles
    trainer: MegatronTrainer
    exporter: Exporter


class MegatronBackend:
    """Trains a model in Megatron-Core, spread over all ranks of the default process group by the configured layout.

    `export` yields the names of the Hugging Face checkpoint, complete on every rank; for the torch engine a layer's
    experts are joined, as that engine holds them.
    """

    def __init__(self, config: JobConfig, checkpoint_dir: pathlib.Path, device: torch.device) -> None:
        """`load` resumes from the newest checkpoint in `checkpoint_dir`, or else in the folder that `load` names."""
        self._config = config
        self._device = device
        self._checkpoint_dir = checkpoint_dir
        self._parts: _Loaded | None = None
        self._log = SampleLog(
            pathlib.Path(config.services.run_dir),
            config.telemetry.log_samples_per_step,
            dist.get_rank(),
            config.reward.reward_key,
        )
        self.loaded_from: pathlib.Path | None = None
        """Checkpoint that `load` read; None for the initial weights."""
        self.lora = None
        """It trains no adapters."""

    def load(self) -> TrainerState:
        """Build everything. Raises FileNotFoundError for a missing model and ValueError for one that does not fit."""
        config = self._config
        torch.manual_seed(config.train.seed)
        place = groups.initialize(config.megatron, config.train.seed, config.cluster.distributed_timeout_minutes)
        roles = build_roles(config, place, self._device)
        if self._device.type == "cpu":
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        exporter = Exporter(
            roles.policy.model,
            algorithm_options.DTYPES[config.rollout.rollout_dtype],
            fuse_experts=config.rollout.rollout_backend == "torch",
        )
        trainer = MegatronTrainer(config, roles, place, roles.routing, self._device)
        self._parts = _Loaded(place, roles, trainer, exporter)
        state = self._restore(self._parts)
        if dist.get_rank() == 0:
            self._log.drop_from(state.step)
        return state

    def train(
        self,
        step: int,
        groups: Sequence[SampleGroup],
        report: Report,
        abandonment: Abandonment | None = None,
    ) -> Mapping[str, float]:
        """See `TrainerBackend.train`."""
        record = functools.partial(self._record, step) if self._log.groups else None
        return self._loaded.trainer.train(step, groups, report, record, abandonment)

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See the class and `TrainerBackend.export`."""
        if self._loaded.roles.old_actors is not None:
            self._loaded.roles.old_actors.publish()
        return self._loaded.exporter.tensors()

    def export_layout(self) -> Sequence[tuple[str, torch.dtype, tuple[int, ...]]]:
        """See `TrainerBackend.export_layout`."""
        return self._loaded.exporter.layout

    def save(self, directory: pathlib.Path, state: TrainerState) -> None:
        """Write a checkpoint that is there whole or not at all; see `checkpoint`."""
        torch_dist.save(directory, self._contents(self._loaded), self._checkpoint_record(state))

    def begin_save(self, directory: pathlib.Path, state: TrainerState) -> Saving:
        """See `TrainerBackend.begin_save`."""
        record = self._checkpoint_record(copy.deepcopy(state))
        return torch_dist.begin(directory, self._contents(self._loaded), record)

    def save_hf(self, directory: pathlib.Path) -> None:
        """See `TrainerBackend.save_hf`; the files' tensors have the rollout's dtype."""
        tensors = self._loaded.exporter.tensors(fuse=False)
        source = pathlib.Path(str(self._config.rollout.hf_checkpoint))
        partial = directory.with_name(directory.name + ".tmp")
        write_hf_checkpoint(partial, source, tensors, algorithm_options.DTYPES[self._config.rollout.rollout_dtype])
        if dist.get_rank() == 0:
            shutil.rmtree(directory, ignore_errors=True)
            partial.rename(directory)
        dist.barrier()

    def close(self) -> None:
        """Free the model. The backend can `load` again."""
        self._parts = None
        groups.destroy()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _record(self, step: int, batch: RolloutBatch, **tokens: Any) -> None:
        place = self._loaded.place
        if place.tensor_rank == place.context_rank == 0 and place.is_last_stage:
            self._log.write(step, recorded(batch, self._log.groups, place.data.rank, **tokens))

    def _restore(self, parts: _Loaded) -> TrainerState:
        self.loaded_from = newest(self._checkpoint_dir)
        if self.loaded_from is None and self._config.checkpoint.load is not None:
            self.loaded_from = newest(pathlib.Path(self._config.checkpoint.load))
        if self.loaded_from is None:
            return TrainerState()
        record = torch_dist.load(self.loaded_from, self._contents(parts))
        parts.roles.policy.iteration = record.iteration
        if parts.roles.critic is not None:
            parts.roles.critic.iteration = record.critic_iteration
        if record.config_digest != digest(self._config):
            logger.warning("%s was saved under another configuration; going on with the new one", self.loaded_from)
        return record.state

    def _checkpoint_record(self, state: TrainerState) -> Record:
        roles = self._loaded.roles
        return Record(
            state=state,
            iteration=roles.policy.iteration,
            world_size=dist.get_world_size(),
            config_digest=digest(self._config),
            old_versions=() if roles.old_actors is None else tuple(roles.old_actors.copies),
            critic_iteration=0 if roles.critic is None else roles.critic.iteration,
        )

    def _contents(self, parts: _Loaded) -> torch_dist.Contents:
        config, roles = self._config, parts.roles
        moves = config.algorithm.ref_update_interval is not None
        return torch_dist.Contents(
            model=roles.policy.model,
            optimizer=None if config.checkpoint.no_save_optim else roles.policy.optimizer.inner,
            reference=roles.reference.copy if roles.reference is not None and moves else None,
            old_actors=roles.old_actors,
            critic=None if roles.critic is None else roles.critic.model,
            critic_optimizer=None
            if roles.critic is None or config.checkpoint.no_save_optim
            else roles.critic.optimizer.inner,
        )

    @property
    def _loaded(self) -> _Loaded:
        if self._parts is None:
            raise RuntimeError("the trainer holds no model: call load() first")
        return self._parts
