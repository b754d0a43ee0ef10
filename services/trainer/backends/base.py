"""What all training backends share: load, restore, train a rollout, save, close."""

from __future__ import annotations

import abc
import contextlib
import copy
import dataclasses
import functools
import gc
import logging
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
import torch.distributed as dist

from miles.config.resume_rules import recorded
from miles.ownership.export import ExportFolder
from miles.precision.recipe import Recipe
from miles.services.trainer.backends.determinism import choose_determinism
from miles.services.trainer.backends.parking import Held, Moved, Parking, free_cached
from miles.services.trainer.batch.rollout_batch import RolloutBatch
from miles.services.trainer.batch.rollout_schedule import RolloutSchedule
from miles.services.trainer.checkpoint.background_save import Saving, on_first_rank
from miles.services.trainer.checkpoint.choice import check_settings, choose
from miles.services.trainer.checkpoint.errors import reading, writing
from miles.services.trainer.checkpoint.initial_weights import gives_weights_alone, where_from
from miles.services.trainer.checkpoint.record import CheckpointRecord, read_record
from miles.services.trainer.checkpoint.state import TrainerState
from miles.services.trainer.ranks.abandoning import Abandonment
from miles.services.trainer.recording.of_job import recorder_of
from miles.services.trainer.step.gradient_norms import save_and_compare
from miles.services.trainer.step.precision_metrics import Inputs, PrecisionMetrics
from miles.services.trainer.step.progress import Report
from miles.services.trainer.step.roles import Roles
from miles.services.trainer.step.sample_log import SampleLog
from miles.services.trainer.step.sample_recording import recorded_samples
from miles.services.trainer.step.training_step import RolloutTrainer
from miles.telemetry.tracing import traced
from miles.types import SampleGroup

if TYPE_CHECKING:
    from miles.config import JobConfig

logger = logging.getLogger(__name__)

_NOT_LOADED = "the trainer holds no model: call load() first"


@dataclasses.dataclass(frozen=True)
class LoadedParts:
    """What `load` builds. Backends narrow the types."""

    roles: Roles
    trainer: RolloutTrainer


PartsT = TypeVar("PartsT", bound=LoadedParts)


class BaseBackend(abc.ABC, Generic[PartsT]):
    """The part of a `TrainerBackend` that all backends share."""

    def __init__(self, config: JobConfig, checkpoint_dir: pathlib.Path, device: torch.device) -> None:
        """`load` resumes from the newest checkpoint in `checkpoint_dir`, or else in the folder that `load` names."""
        self._config = config
        self._device = device
        self._checkpoint_dir = checkpoint_dir
        self._parts: PartsT | None = None
        self._parking: Parking | None = None
        self._log = SampleLog(
            pathlib.Path(config.services.run_dir),
            config.telemetry.log_samples_per_step,
            dist.get_rank(),
            config.reward.reward_key,
            whole=config.telemetry.log_whole_samples,
        )
        self.loaded_from: pathlib.Path | None = None
        """Checkpoint that `load` read; None for the initial weights."""
        self.notes: list[str] = []
        """What a person should know of how `load` went."""
        self._precision = PrecisionMetrics(config)
        self.warnings: Sequence[str] = ()
        """What a person should know of how the last `train` went; the same on every rank."""

    def load(self) -> TrainerState:
        """Build everything, and read a checkpoint if there is one.

        Raises FileNotFoundError for a missing model or checkpoint, and ValueError for one that does not fit or cannot
        be read.
        """
        self.notes.clear()
        load = None if gives_weights_alone(self._config) else self._config.checkpoint.load
        self.loaded_from = choose(self._checkpoint_dir, None if load is None else pathlib.Path(load), self._say)
        record = None if self.loaded_from is None else self._fitting_record(self.loaded_from)
        if record is None and (words := where_from(self._config)):
            self._say(words)
        torch.manual_seed(self._config.train.seed)
        choose_determinism(self._device, asked=self._config.train.deterministic_mode)
        self._parts = self._build()
        self._parts.trainer.record_with(recorder_of(self._config))
        self._parking = Parking(self._held(self._parts), self._device)
        state = TrainerState() if record is None else self._restore(record)
        if dist.get_rank() == 0:
            self._log.discard_from(state.step)
            recorder = self._parts.trainer.recorder
            if recorder is not None and (words := recorder.discard_from(state.step)):
                self._say(words)
        return state

    def train(
        self,
        step: int,
        groups: Sequence[SampleGroup],
        report: Report,
        abandonment: Abandonment | None = None,
        schedule: RolloutSchedule | None = None,
    ) -> Mapping[str, float]:
        """See `TrainerBackend.train`."""
        record = functools.partial(self._record_samples, step) if self._log.groups else None
        trainer = self._loaded.trainer
        observed = self._precision.due(step)
        with self._precision.observing(self._input_modules) if observed else contextlib.nullcontext():
            metrics = trainer.train(step, groups, report, record, abandonment, schedule)
        if observed:
            metrics |= self._precision.metrics(self._exported_types(self._export()))
        self.warnings = tuple(trainer.warnings)
        if dist.get_rank() == 0:  # nothing follows that other ranks would wait in
            save_and_compare(self._config.debug, step, trainer.gradient_norms)
        return metrics

    @property
    def replica(self) -> int:
        """See `TrainerBackend.replica`."""
        return self._loaded.trainer.replica

    def schedule(self, groups: Sequence[SampleGroup]) -> RolloutSchedule:
        """See `TrainerBackend.schedule`."""
        return self._loaded.trainer.schedule(groups)

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `TrainerBackend.export`."""
        self._note_export()
        return self._export()

    def export_to_first(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `TrainerBackend.export_to_first`."""
        self._note_export()
        return self._export_to_first()

    def save(self, directory: pathlib.Path, state: TrainerState) -> None:
        """See `TrainerBackend.save`; a crash leaves the complete checkpoint or none."""
        with writing(directory):
            self._save(directory, self._record_of(state))

    def begin_save(self, directory: pathlib.Path, state: TrainerState) -> Saving:
        """See `TrainerBackend.begin_save`."""
        with writing(directory):
            return self._begin_save(directory, self._record_of(copy.deepcopy(state)))

    def save_hf(self, directory: pathlib.Path) -> None:
        """See `TrainerBackend.save_hf`; the files' tensors have the rollout's dtype, or the engines' format."""
        run_dir, pattern = pathlib.Path(self._config.services.run_dir), self._config.checkpoint.save_hf
        replace_export(ExportFolder(directory, run_dir, pattern), self._write_hf)

    @traced("release memory")
    def release_memory(self, *, state: bool = True) -> Moved:
        """See `TrainerBackend.release_memory`."""
        self._before_release(self._loaded)
        return self._host.park() if state else free_cached(self._device)

    @traced("restore memory")
    def restore_memory(self) -> Moved:
        """See `TrainerBackend.restore_memory`."""
        return self._host.restore()

    def close(self) -> None:
        """Free the model. The backend can `load` again."""
        if self._parts is not None and self._parts.trainer.recorder is not None:
            self._parts.trainer.recorder.close()
        self._parts = self._parking = None
        self._destroy_groups()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @abc.abstractmethod
    def _build(self) -> PartsT:
        """Build the models and load their initial weights."""

    @abc.abstractmethod
    def export_layout(self) -> Sequence[tuple[str, torch.dtype, tuple[int, ...]]]:
        """See `TrainerBackend.export_layout`."""

    @abc.abstractmethod
    def _input_modules(self, recipe: Recipe) -> Inputs:
        """The modules of the policy whose inputs are multiplied by matrices that a recipe covers."""

    @abc.abstractmethod
    def _export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the weights that engines get."""

    @abc.abstractmethod
    def _export_to_first(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the weights that engines get on rank 0; gather what has changed since the last time."""

    @abc.abstractmethod
    def _save(self, directory: pathlib.Path, record: CheckpointRecord) -> None:
        """Write a checkpoint."""

    @abc.abstractmethod
    def _begin_save(self, directory: pathlib.Path, record: CheckpointRecord) -> Saving:
        """Copy what a checkpoint holds and begin to write it."""

    @abc.abstractmethod
    def _load_checkpoint(self, directory: pathlib.Path, record: CheckpointRecord) -> None:
        """Read a checkpoint into the models and optimizers, and say what it lacks."""

    @abc.abstractmethod
    def _write_hf(self, directory: pathlib.Path) -> None:
        """Write the policy to a new folder; collective, rank 0 writes."""

    @abc.abstractmethod
    def _held(self, parts: PartsT) -> Held:
        """Everything that is held on the device between calls."""

    def _before_release(self, parts: PartsT) -> None:
        """Free what was gathered or kept for the next call."""

    @abc.abstractmethod
    def _destroy_groups(self) -> None:
        """Destroy the process groups that this backend has made."""

    @abc.abstractmethod
    def _recording_replica(self) -> int | None:
        """Number of this rank's replica, if this rank is the one that logs the replica's samples."""

    def _note_export(self) -> None:
        if self._loaded.roles.old_policies is not None:
            self._loaded.roles.old_policies.publish()
        if self._config.cluster.colocate:
            free_cached(self._device)  # a version that engines share would keep the large blocks it was put into

    def _exported_types(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of an export in the types of its layout, which some still have to be converted to."""
        for (name, tensor), (_, dtype, _) in zip(tensors, self.export_layout(), strict=True):
            yield name, tensor.to(dtype)

    def _fitting_record(self, directory: pathlib.Path) -> CheckpointRecord:
        record = read_record(directory)
        # Records of version 1 have no settings; Megatron-Core writes this file.
        former = "megatron" if (directory / "metadata.json").is_file() else "fsdp"
        backend = record.settings.get("train_backend", former)
        check_settings(directory, record, self._config.to_flat(), backend, self._say)
        return record

    def _restore(self, record: CheckpointRecord) -> TrainerState:
        assert self.loaded_from is not None, "there is a record"
        with reading(self.loaded_from):
            self._load_checkpoint(self.loaded_from, record)
        roles = self._loaded.roles
        roles.policy.iteration = record.iteration
        if roles.critic is not None:
            roles.critic.iteration = record.critic_iteration
        return record.state

    def _say(self, text: str) -> None:
        logger.warning("%s", text)
        self.notes.append(text)

    def _record_of(self, state: TrainerState) -> CheckpointRecord:
        roles = self._loaded.roles
        return CheckpointRecord(
            state=state,
            iteration=roles.policy.iteration,
            world_size=dist.get_world_size(),
            settings=recorded(self._config.to_flat()),
            old_versions=() if roles.old_policies is None else tuple(roles.old_policies.copies),
            critic_iteration=0 if roles.critic is None else roles.critic.iteration,
        )

    @traced("record samples")
    def _record_samples(self, step: int, batch: RolloutBatch, **tokens: Any) -> None:
        replica = self._recording_replica()
        if replica is None:
            return
        with writing(pathlib.Path(self._config.services.run_dir) / "samples"):
            self._log.write(step, recorded_samples(batch, self._log.groups, replica, **tokens))

    @property
    def _reference_moves(self) -> bool:
        """Whether the reference changes during the run, so that checkpoints must hold it."""
        return self._config.algorithm.ref_update_interval is not None

    @property
    def _chat_template(self) -> pathlib.Path | None:
        """The Jinja file that prompts are rendered with; None for the tokenizer's own."""
        path = self._config.data.chat_template_path
        return None if path is None else pathlib.Path(path)

    @property
    def _host(self) -> Parking:
        if self._parking is None:
            raise RuntimeError(_NOT_LOADED)
        return self._parking

    @property
    def _loaded(self) -> PartsT:
        if self._parts is None:
            raise RuntimeError(_NOT_LOADED)
        return self._parts


def replace_export(export: ExportFolder, write: Callable[[pathlib.Path], None]) -> None:
    """Have `write` fill a new folder, then put it in the place of the export, so that readers see a complete one.

    Collective; rank 0 touches the files. Raises OSError on all ranks: FolderTakenError on rank 0 when the place is not
    the run's to write.
    """
    on_first_rank(export.prepare)
    with writing(export.folder, export.partial):
        write(export.partial)
        on_first_rank(export.complete)
