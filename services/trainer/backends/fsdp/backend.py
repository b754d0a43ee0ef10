"""The FSDP backend: model, optimizer, training step and checkpoints behind the `TrainerBackend` Protocol."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import logging
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from miles.rpc.gen import policy_pb2
from miles.services.trainer.backends.fsdp import checkpoint
from miles.services.trainer.backends.fsdp.export import gathered
from miles.services.trainer.backends.fsdp.learner import FsdpLearner
from miles.services.trainer.backends.fsdp.lora.adapter import merged_weights
from miles.services.trainer.backends.fsdp.lora.layers import named_adapters
from miles.services.trainer.backends.fsdp.model.build_roles import FsdpRoles, build_roles
from miles.services.trainer.backends.fsdp.model.sharded_model import full_tensor, named_weights
from miles.services.trainer.backends.fsdp.step import FsdpTrainer
from miles.services.trainer.batch.rollout_batch import RolloutBatch
from miles.services.trainer.checkpoint import record as checkpoint_record
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
    from transformers import PreTrainedModel

    from miles.config import JobConfig

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class _Loaded:
    """What `load` builds."""

    roles: FsdpRoles
    trainer: FsdpTrainer

    @property
    def policy(self) -> PreTrainedModel:
        return cast("PreTrainedModel", self.roles.policy.model)


class FsdpBackend:
    """Trains a Hugging Face model that is sharded over all ranks of the default process group.

    What `export` yields has the names of the model's own `state_dict()`, a tied tensor once under its first name. In
    mixture-of-experts models of transformers 5 the experts of a layer are one fused three-dimensional parameter; an
    engine that runs the same modelling code takes it as it is. `save_hf` writes the names of the checkpoint format.
    With `lora_rank` the policy is a frozen base and an adapter, and `export` yields the adapter alone.
    """

    def __init__(self, config: JobConfig, checkpoint_dir: pathlib.Path, device: torch.device) -> None:
        """`load` resumes from the newest checkpoint in `checkpoint_dir`, or else in the folder that `load` names."""
        self._config = config
        self._device = device
        self._checkpoint_dir = checkpoint_dir
        self._parts: _Loaded | None = None
        self._save_group: dist.ProcessGroup | None = None
        """Over all ranks, for a thread that writes a checkpoint."""
        self._log = SampleLog(
            pathlib.Path(config.services.run_dir),
            config.telemetry.log_samples_per_step,
            dist.get_rank(),
            config.reward.reward_key,
        )
        self.loaded_from: pathlib.Path | None = None
        """Checkpoint that `load` read; None for the initial weights."""

    def load(self) -> TrainerState:
        """Build everything. Raises FileNotFoundError for a missing model and ValueError for one that does not fit."""
        config = self._config
        torch.manual_seed(config.train.seed)
        if self._device.type == "cpu":
            torch.use_deterministic_algorithms(True)
            # A debugging aid that comes with the switch above and costs a sixth of the step.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        roles = build_roles(config, self._device)
        self._parts = _Loaded(roles, FsdpTrainer(config, roles, roles.routing, self._device))
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
        return self._gathered(self._exported())

    @property
    def lora(self) -> policy_pb2.LoraAdapter | None:
        """See `TrainerBackend.lora`."""
        adapter = self._loaded.roles.adapter
        return None if adapter is None else adapter.described

    def new_bucket(self, nbytes: int) -> torch.Tensor:
        """Memory for a bucket of an export, uint8 (nbytes,)."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def export_layout(self) -> Sequence[tuple[str, torch.dtype, tuple[int, ...]]]:
        """See `TrainerBackend.export_layout`."""
        dtype = algorithm_options.DTYPES[self._config.rollout.rollout_dtype]
        return [
            (name, dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
            for name, tensor in self._exported()
        ]

    def _exported(self) -> Iterable[tuple[str, torch.Tensor]]:
        parts = self._loaded
        return named_weights(parts.policy) if parts.roles.adapter is None else named_adapters(parts.policy)

    def _gathered(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        dtype = algorithm_options.DTYPES[self._config.rollout.rollout_dtype]
        return gathered(weights, dtype, self._config.weights.update_weight_buffer_size, self.new_bucket)

    def save(self, directory: pathlib.Path, state: TrainerState) -> None:
        """Write a checkpoint that is there whole or not at all; see `checkpoint`."""
        checkpoint.save(directory, self._contents(self._loaded), self._checkpoint_record(state))

    def begin_save(self, directory: pathlib.Path, state: TrainerState) -> Saving:
        """See `TrainerBackend.begin_save`."""
        contents, record = self._contents(self._loaded), self._checkpoint_record(copy.deepcopy(state))
        if self._save_group is None:
            self._save_group = dist.new_group(backend="gloo")
        return checkpoint.begin(directory, contents, record, self._save_group)

    def save_hf(self, directory: pathlib.Path) -> None:
        """See `TrainerBackend.save_hf`; the files' tensors have the rollout's dtype.

        An adapter is merged in, and also written by itself, in PEFT's form and in float32, to the folder `adapter`.
        """
        first, policy, adapter = dist.get_rank() == 0, self._loaded.policy, self._loaded.roles.adapter
        whole = self._gathered(named_weights(policy)) if adapter is None else merged_weights(policy, self._gathered)
        weights = {name: tensor.to("cpu", copy=True) for name, tensor in whole if first}
        adapters = {} if adapter is None else {name: full_tensor(part) for name, part in named_adapters(policy)}
        if first:
            from transformers import AutoTokenizer

            partial = directory.with_name(directory.name + ".tmp")
            shutil.rmtree(partial, ignore_errors=True)
            policy.save_pretrained(partial, state_dict=weights)
            if adapter is not None:
                adapter.write(partial / "adapter", adapters)
            AutoTokenizer.from_pretrained(self._config.rollout.hf_checkpoint).save_pretrained(partial)
            # Whoever sees the folder sees all of it.
            shutil.rmtree(directory, ignore_errors=True)
            partial.rename(directory)
        dist.barrier()

    def close(self) -> None:
        """Free the model. The backend can `load` again."""
        self._parts = None
        if self._save_group is not None:
            dist.destroy_process_group(self._save_group)
        self._save_group = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _record(self, step: int, batch: RolloutBatch, **tokens: Any) -> None:
        rank = dist.get_rank()
        self._log.write(step, recorded(batch, self._log.groups, rank, **tokens))

    def _restore(self, parts: _Loaded) -> TrainerState:
        self.loaded_from = newest(self._checkpoint_dir)
        if self.loaded_from is None and self._config.checkpoint.load is not None:
            self.loaded_from = newest(pathlib.Path(self._config.checkpoint.load))
        if self.loaded_from is None:
            return TrainerState()
        served = "" if self.lora is None else self.lora.base_checksum.hex()  # what checkpoints named once
        checkpoint_record.check_base(self.loaded_from, self._base, served)
        record = checkpoint.load(self.loaded_from, self._contents(parts))
        policy, critic = parts.roles.policy, parts.roles.critic
        policy.iteration = record.iteration
        policy.loss_scale.value, policy.loss_scale.good_steps = record.loss_scale, record.good_steps
        if critic is not None and record.critic_iteration:
            critic.iteration = record.critic_iteration
            critic.loss_scale.value = record.critic_loss_scale
            critic.loss_scale.good_steps = record.critic_good_steps
        if record.config_digest != digest(self._config):
            logger.warning("%s was saved under another configuration; going on with the new one", self.loaded_from)
        return record.state

    def _checkpoint_record(self, state: TrainerState) -> Record:
        roles = self._loaded.roles
        record = Record(
            state=state,
            iteration=roles.policy.iteration,
            world_size=dist.get_world_size(),
            config_digest=digest(self._config),
            loss_scale=roles.policy.loss_scale.value,
            good_steps=roles.policy.loss_scale.good_steps,
            old_versions=() if roles.old_actors is None else tuple(roles.old_actors.copies),
            base=self._base,
        )
        if (critic := roles.critic) is None:
            return record
        return dataclasses.replace(
            record,
            critic_iteration=critic.iteration,
            critic_loss_scale=critic.loss_scale.value,
            critic_good_steps=critic.loss_scale.good_steps,
        )

    def _contents(self, parts: _Loaded) -> checkpoint.Contents:
        config, roles = self._config, parts.roles
        moves = config.algorithm.ref_update_interval is not None

        def trained(learner: FsdpLearner[Any]) -> checkpoint.Trained:
            optimizer = None if config.checkpoint.no_save_optim else learner.optimizer
            adapted = learner is roles.policy and roles.adapter is not None
            return checkpoint.Trained(learner.model, optimizer, trained_only=adapted)

        return checkpoint.Contents(
            policy=trained(roles.policy),
            critic=None if roles.critic is None else trained(roles.critic),
            reference=roles.reference.model if roles.reference is not None and moves else None,
            old_actors=roles.old_actors,
        )

    @property
    def _base(self) -> str:
        """Identity of the weights that an adapter is trained on; empty when all of the policy is trained."""
        adapter = self._loaded.roles.adapter
        return "" if adapter is None else adapter.identity

    @property
    def _loaded(self) -> _Loaded:
        if self._parts is None:
            raise RuntimeError("the trainer holds no model: call load() first")
        return self._parts
