"""One rollout's training: log-probabilities that are needed beforehand, advantages, then the optimizer steps.

Dims: T response tokens of this rank's samples.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from miles.algorithms.advantages import compute_advantages, shape_rewards
from miles.algorithms.corrections import Correction, compute_correction
from miles.algorithms.estimators import AdvantageBatch
from miles.algorithms.losses import LossBatch, rl_loss
from miles.algorithms.metrics import MetricSum, reduce_metrics
from miles.services.trainer.backend import Progress
from miles.services.trainer.backends.fsdp import settings
from miles.services.trainer.backends.fsdp.batch import (
    OptimizerStepPlan,
    RolloutBatch,
    build_batch,
    in_order,
    trained_reward,
)
from miles.services.trainer.backends.fsdp.forward import ForwardOptions, forward
from miles.services.trainer.backends.fsdp.model import named_weights
from miles.services.trainer.backends.fsdp.optimizer import LossScale, clip_gradients, learning_rate, set_learning_rate
from miles.services.trainer.backends.fsdp.packing import MicroBatch
from miles.services.trainer.backends.fsdp.routing_replay import RoutingReplay, rollout_routing
from miles.types import Sample, SampleGroup, SampleStatus

if TYPE_CHECKING:
    from miles.config import JobConfig

Report = Callable[[Progress], None]
Record = Callable[..., None]
"""Takes the batch and, by keyword, what `recorded` takes of its tokens."""


@dataclasses.dataclass(frozen=True, slots=True)
class _TokenTensors:
    """What is known of this rank's response tokens before the first optimizer step; float32 [T] on the device."""

    mask: torch.Tensor
    advantages: torch.Tensor
    train: torch.Tensor | None
    """Log-probabilities of the policy as it is; None when the training pass itself gives them."""
    ref: torch.Tensor | None
    rollout: torch.Tensor | None
    correction: Correction | None
    """Only what needs the whole batch."""
    seen: torch.Tensor
    """Log-probabilities before the first optimizer step: `train`, or filled in by the training pass."""


class RolloutTrainer:
    """Trains a policy on one rollout after the other; every rank makes the same calls."""

    def __init__(
        self,
        config: JobConfig,
        policy: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        reference: torch.nn.Module | None,
        replay: RoutingReplay | None,
        options: ForwardOptions,
        total_iterations: int,
    ) -> None:
        self._config = config
        self._policy = policy
        self._optimizer = optimizer
        self._reference = reference
        self._replay = replay
        self._options = options
        self._total_iterations = total_iterations
        self._group = dist.group.WORLD if dist.get_world_size() > 1 else None
        self._loss_config = settings.loss_config(config)
        self._recorded: dict[int, torch.Tensor] = {}
        """Routing by identity of the micro-batch, within one rollout."""
        self.iteration = 0
        """Optimizer steps taken."""
        self.loss_scale = LossScale(dynamic=options.compute is torch.float16)

    def train(self, groups: Sequence[SampleGroup], report: Report, record: Record | None = None) -> dict[str, float]:
        """Take the optimizer steps of one rollout; returns metrics by name, the same on every rank.

        `record` is given what there is to record of this rank's samples, when all is done.
        """
        began = time.monotonic()
        samples = in_order(groups)
        rewards_N = self._shaped_rewards(samples)
        idle = (
            rewards_N.eq(0).nonzero().flatten().tolist() if settings.zero_reward_is_zero_gradient(self._config) else ()
        )
        batch = build_batch(samples, self._config, dist.get_rank(), dist.get_world_size(), frozenset(idle))
        self._recorded.clear()
        tokens = self._prepare(batch, rewards_N, report)
        prepared = time.monotonic()
        parts: list[dict[str, MetricSum]] = []
        norms: list[float] = []
        count = sum(len(step.all_micro_batches) for step in batch.steps)
        for step in batch.steps:
            for number, micro_batch in enumerate(step.all_micro_batches):
                report(Progress("forward_backward", len(parts), count))
                with_gradient = number >= len(step.observed)
                parts.append(self._forward_backward(batch, step, micro_batch, tokens, with_gradient=with_gradient))
            report(Progress("optimizer", len(parts), count))
            norms.append(self._optimizer_step())
        if record is not None:
            record(
                batch,
                mask_T=tokens.mask,
                advantages_T=tokens.advantages,
                train_log_probs_T=tokens.seen,
                rollout_log_probs_T=tokens.rollout,
            )
        return reduce_metrics(parts, self._group) | {
            "train/grad_norm": sum(norms) / len(norms),
            "train/lr": self._optimizer.param_groups[0]["lr"],
            "perf/log_probs_time": prepared - began,
        }

    def update_reference(self) -> None:
        """Make the reference equal to the policy as it is."""
        if self._reference is not None:
            policy = dict(named_weights(self._policy))
            with torch.no_grad():
                for name, weight in named_weights(self._reference):
                    weight.copy_(policy[name])

    def _prepare(self, batch: RolloutBatch, rewards_N: torch.Tensor, report: Report) -> _TokenTensors:
        """Everything that is computed on the whole batch before the first optimizer step."""
        config, device = self._config, self._options.device
        mask = batch.masks().to(device)
        rollout, teacher = (
            None if x is None else x.to(device)
            for x in (batch.token_values("rollout_log_probs"), batch.token_values("teacher_log_probs"))
        )
        train = self._log_probs(self._policy, batch, report) if settings.needs_log_prob_pass(config) else None
        ref = self._log_probs(self._reference, batch, report) if self._reference is not None else None
        advantages = compute_advantages(
            settings.advantage_config(config),
            AdvantageBatch(
                packing=batch.packing,
                mask_T=mask,
                rewards_B=rewards_N[list(batch.mine)].to(device),
                old_log_probs_T=train,
                ref_log_probs_T=ref,
                teacher_log_probs_T=teacher,
            ),
            self._group,
        )
        method = settings.correction_method(config)
        correction = None
        if method is not None and train is not None and rollout is not None:
            correction = compute_correction(
                method,
                train_log_probs_T=train,
                rollout_log_probs_T=rollout,
                mask_T=mask,
                packing=batch.packing,
                group=self._group,
            )
        seen = torch.zeros_like(mask) if train is None else train
        return _TokenTensors(mask, advantages.advantages_T, train, ref, rollout, correction, seen)

    def _shaped_rewards(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Group-normalised rewards of all N samples; float32 [N]. FAILED samples stand outside their group."""
        shaped = torch.zeros(len(samples))
        scored = [i for i, sample in enumerate(samples) if sample.status is not SampleStatus.FAILED]
        shaped[scored] = shape_rewards(
            settings.advantage_config(self._config),
            [trained_reward(samples[i], self._config.reward.reward_key) for i in scored],
            [samples[i].group_id for i in scored],
        )
        return shaped

    def _log_probs(self, model: torch.nn.Module, batch: RolloutBatch, report: Report) -> torch.Tensor:
        """The model's log-probabilities of this rank's response tokens; float32 [T]."""
        same_cut = self._config.algorithm.use_routing_replay  # recorded routing is kept by micro-batch
        micro_batches = (
            [m for step in batch.steps for m in step.all_micro_batches] if same_cut else batch.log_prob_micro_batches
        )
        result = torch.zeros(batch.packing.num_tokens, device=self._options.device)
        for done, micro_batch in enumerate(micro_batches):
            report(Progress("log_probs", done, len(micro_batches)))
            if model is self._policy:
                self._route(batch, micro_batch)
            with torch.no_grad():
                outputs = forward(model, micro_batch, self._options)
            result[batch.place(micro_batch).to(result.device)] = outputs.log_probs_T
            if model is self._policy:
                self._keep_routing(micro_batch)
        return result

    def _forward_backward(
        self,
        batch: RolloutBatch,
        step: OptimizerStepPlan,
        micro_batch: MicroBatch,
        tokens: _TokenTensors,
        *,
        with_gradient: bool,
    ) -> dict[str, MetricSum]:
        """Add the micro-batch's gradient; returns its part of the step's metrics."""
        algorithm = self._config.algorithm
        self._route(batch, micro_batch)
        with torch.set_grad_enabled(with_gradient):
            outputs = forward(
                self._policy,
                micro_batch,
                self._options,
                with_entropy=algorithm.entropy_coef != 0 or algorithm.observe_training_entropy,
                entropy_requires_grad=algorithm.entropy_coef != 0,
            )
        where = batch.place(micro_batch).to(self._options.device)
        if tokens.train is None:
            tokens.seen[where] = outputs.log_probs_T.detach()
        members = [batch.position(i) for i in micro_batch.samples]
        loss = rl_loss(
            self._loss_config,
            LossBatch(
                packing=batch.packing.subset(members),
                mask_T=tokens.mask[where],
                advantages_T=tokens.advantages[where],
                train_log_probs_T=None if tokens.train is None else tokens.train[where],
                rollout_log_probs_T=None if tokens.rollout is None else tokens.rollout[where],
                ref_log_probs_T=None if tokens.ref is None else tokens.ref[where],
                correction=None if tokens.correction is None else tokens.correction.take(batch.packing, members),
                denominator=step.num_tokens if algorithm.calculate_per_token_loss else step.num_samples,
            ),
            outputs.log_probs_T,
            outputs.entropy_T,
        )
        if with_gradient:
            # FSDP averages gradients over ranks; the loss is this rank's share of the step's.
            torch.autograd.backward(loss.loss * (dist.get_world_size() * self.loss_scale.value))
        return loss.metrics

    def _optimizer_step(self) -> float:
        """Clip, step and clear the gradients; returns their norm before clipping."""
        config = self._config.optimizer
        set_learning_rate(self._optimizer, learning_rate(self.iteration, config, self._total_iterations))
        norm = self.loss_scale.unscale(self._optimizer)
        if norm is not None:
            clip_gradients(self._optimizer, norm, config.clip_grad)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.iteration += 1
        return 0.0 if norm is None else norm

    def _route(self, batch: RolloutBatch, micro_batch: MicroBatch) -> None:
        """Set the routing of the next forward: the engine's, what was recorded, or the model's own."""
        if self._replay is None:
            return
        if micro_batch.is_empty:
            self._replay.choose_freely()
        elif self._config.rollout.use_rollout_routing_replay:
            self._replay.replay(rollout_routing(batch.samples, micro_batch).to(self._options.device))
        elif id(micro_batch) in self._recorded:
            self._replay.replay(self._recorded[id(micro_batch)])
        else:
            self._replay.record()

    def _keep_routing(self, micro_batch: MicroBatch) -> None:
        """Remember the routing that a log-probability pass has just recorded, for the training pass."""
        if self._config.algorithm.use_routing_replay and self._replay is not None and not micro_batch.is_empty:
            self._recorded[id(micro_batch)] = self._replay.recorded()
