"""The FSDP backend: model, optimizer, training step and checkpoints behind the `TrainerBackend` Protocol."""

from __future__ import annotations

import datetime
import gc
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from miles.services.trainer.backend import Progress, TrainerState
from miles.services.trainer.backends.fsdp import checkpoint, settings
from miles.services.trainer.backends.fsdp.forward import ForwardOptions
from miles.services.trainer.backends.fsdp.model import Precision, full_tensor, load_hf_model, named_weights, shard
from miles.services.trainer.backends.fsdp.optimizer import build_optimizer
from miles.services.trainer.backends.fsdp.routing_replay import RoutingReplay
from miles.services.trainer.backends.fsdp.step import RolloutTrainer
from miles.types import SampleGroup

if TYPE_CHECKING:
    from miles.config import JobConfig

logger = logging.getLogger(__name__)


class FsdpBackend:
    """Trains a Hugging Face model that is sharded over all ranks of the default process group.

    What `export` yields has the names of the model's own `state_dict()`, a tied tensor once under its first name. In
    mixture-of-experts models of transformers 5 the experts of a layer are one fused three-dimensional parameter; an
    engine that runs the same modelling code takes it as it is. `save_hf` writes the names of the checkpoint format.
    """

    def __init__(self, config: JobConfig, checkpoint_dir: pathlib.Path, device: torch.device) -> None:
        """`checkpoint_dir` is where `save` writes below and, unless the configuration names another, `load` reads."""
        self._config = config
        self._device = device
        self._checkpoint_dir = pathlib.Path(config.checkpoint.load or checkpoint_dir)
        self._trainer: RolloutTrainer | None = None
        self._policy: torch.nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self.loaded_from: pathlib.Path | None = None
        """Checkpoint that `load` read; None for the initial weights."""

    def load(self) -> TrainerState:
        """Build everything. Raises FileNotFoundError for a missing model and ValueError for one that does not fit."""
        config = self._config
        torch.manual_seed(config.train.seed)
        if self._device.type == "cpu":
            torch.use_deterministic_algorithms(True)
        model_dir = config.rollout.hf_checkpoint
        if model_dir is None:
            raise ValueError("hf_checkpoint is not set; it names the Hugging Face folder to start from")
        precision = settings.precision(config)
        policy = load_hf_model(model_dir, precision.master, gradient_checkpointing=config.train.gradient_checkpointing)
        wants_replay = config.algorithm.use_routing_replay or config.rollout.use_rollout_routing_replay
        replay = RoutingReplay(policy) if wants_replay else None
        offload = config.train.fsdp_cpu_offload
        shard(policy.to("cpu" if offload else self._device), precision, self._device, cpu_offload=offload)
        self._policy = policy
        self._optimizer = build_optimizer(policy, config.optimizer)
        self._trainer = RolloutTrainer(
            config,
            policy,
            self._optimizer,
            reference=self._load_reference(precision.compute) if settings.needs_reference(config) else None,
            replay=replay,
            options=ForwardOptions(
                device=self._device,
                compute=precision.compute,
                temperature=config.rollout.rollout_temperature or 1.0,
                chunk_rows=config.train.log_probs_chunk_size if config.train.log_probs_chunk_size > 0 else None,
                varlen={"auto": None, "varlen": True, "sdpa": False}[config.train.attn_implementation],
            ),
            total_iterations=(config.data.num_rollout or 0) * config.train.num_steps_per_rollout,
        )
        return self._restore()

    def train(
        self, step: int, groups: Sequence[SampleGroup], report: Callable[[Progress], None]
    ) -> Mapping[str, float]:
        """See `TrainerBackend.train`."""
        interval = self._config.algorithm.ref_update_interval
        trainer = self._loaded(self._trainer)
        metrics = trainer.train(groups, report)
        if interval is not None and (step + 1) % interval == 0:
            trainer.update_reference()
        return metrics

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See the class and `TrainerBackend.export`."""
        dtype = settings.DTYPES[self._config.rollout.rollout_dtype]
        for name, tensor in named_weights(self._loaded(self._policy)):
            whole = full_tensor(tensor)
            yield name, whole.to(dtype) if whole.is_floating_point() else whole

    def export_layout(self) -> Sequence[tuple[str, torch.dtype, tuple[int, ...]]]:
        """See `TrainerBackend.export_layout`."""
        dtype = settings.DTYPES[self._config.rollout.rollout_dtype]
        return [
            (name, dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
            for name, tensor in named_weights(self._loaded(self._policy))
        ]

    def save(self, directory: pathlib.Path, state: TrainerState) -> None:
        """Write a checkpoint that is there whole or not at all; see `checkpoint`."""
        trainer = self._loaded(self._trainer)
        optimizer = None if self._config.checkpoint.no_save_optim else self._loaded(self._optimizer)
        record = checkpoint.Record(state, trainer.iteration, dist.get_world_size(), checkpoint.digest(self._config))
        checkpoint.save(directory, self._loaded(self._policy), optimizer, record)

    def save_hf(self, directory: pathlib.Path) -> None:
        """See `TrainerBackend.save_hf`; the files' tensors have the rollout's dtype."""
        policy = self._loaded(self._policy)
        weights = {name: tensor.cpu() for name, tensor in self.export()}
        if dist.get_rank() == 0:
            from transformers import AutoTokenizer

            policy.save_pretrained(directory, state_dict=weights)  # type: ignore[operator]
            AutoTokenizer.from_pretrained(self._config.rollout.hf_checkpoint).save_pretrained(directory)
        dist.barrier()

    def close(self) -> None:
        """Free the model. The backend can `load` again."""
        self._trainer = self._policy = self._optimizer = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _load_reference(self, dtype: torch.dtype) -> torch.nn.Module:
        folder = self._config.checkpoint.ref_load or self._config.rollout.hf_checkpoint
        assert folder is not None
        reference = load_hf_model(folder, dtype, gradient_checkpointing=False).requires_grad_(False)
        offload = self._config.train.fsdp_cpu_offload
        reference.to("cpu" if offload else self._device)
        shard(reference, Precision(dtype, dtype), self._device, cpu_offload=offload)
        return reference

    def _restore(self) -> TrainerState:
        self.loaded_from = checkpoint.newest(self._checkpoint_dir)
        if self.loaded_from is None:
            return TrainerState()
        optimizer = None if self._config.checkpoint.no_save_optim else self._loaded(self._optimizer)
        record = checkpoint.load(self.loaded_from, self._loaded(self._policy), optimizer)
        self._loaded(self._trainer).iteration = record.iteration
        if record.config_digest != checkpoint.digest(self._config):
            logger.warning("%s was saved under another configuration; going on with the new one", self.loaded_from)
        return record.state

    def _loaded(self, part: object) -> object:
        if part is None:
            raise RuntimeError("the trainer holds no model: call load() first")
        return part


def init_process_group(backend: str, timeout_minutes: float) -> None:
    """Join torchrun's process group, or make one of this process alone when torchrun did not start it.

    Does nothing when there is one already.
    """
    import os

    if dist.is_initialized():
        return
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
