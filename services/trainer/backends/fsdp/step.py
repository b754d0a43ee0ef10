"""One rollout's training with a Hugging Face model under FSDP2. Dims: T response tokens of this rank's samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from miles.algorithms.metrics import MetricSum, reduce_metrics
from miles.services.trainer.backend import Progress
from miles.services.trainer.backends.fsdp.forward import ForwardOptions, forward
from miles.services.trainer.backends.fsdp.model import named_weights
from miles.services.trainer.backends.fsdp.optimizer import LossScale, clip_gradients, learning_rate, set_learning_rate
from miles.services.trainer.backends.fsdp.routing_replay import RoutingReplay, rollout_routing
from miles.services.trainer.batch import OptimizerStepPlan, RolloutBatch
from miles.services.trainer.packing import MicroBatch
from miles.services.trainer.rollout_step import DataRanks, Report, RolloutTrainer, TokenTensors

if TYPE_CHECKING:
    from miles.config import JobConfig


class FsdpTrainer(RolloutTrainer):
    """Every rank is a replica; FSDP averages the gradients."""

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
        group = dist.group.WORLD if dist.get_world_size() > 1 else None
        super().__init__(config, DataRanks(dist.get_rank(), dist.get_world_size(), group), options.device)
        self._policy = policy
        self._optimizer = optimizer
        self._reference = reference
        self._replay = replay
        self._options = options
        self._total_iterations = total_iterations
        self._recorded: dict[int, torch.Tensor] = {}
        """Routing by identity of the micro-batch, within one rollout."""
        self.loss_scale = LossScale(dynamic=options.compute is torch.float16)

    @property
    def learning_rate(self) -> float:
        rate: float = self._optimizer.param_groups[0]["lr"]
        return rate

    def begin(self, batch: RolloutBatch) -> None:
        self._recorded.clear()
        if self._replay is not None:
            self._replay.take_difference()

    def reduce(self, parts: Sequence[dict[str, MetricSum]]) -> dict[str, float]:
        if self._replay is not None and self._config.rollout.use_rollout_routing_replay:
            different, counted = self._replay.take_difference()
            total = torch.tensor(different, dtype=torch.float64, device=self._device)
            parts = [*parts, {"train/routing_difference": MetricSum(total, counted)}]
        return reduce_metrics(parts, self._data_ranks.group)

    def update_reference(self) -> None:
        """Make the reference equal to the policy as it is."""
        if self._reference is not None:
            policy = dict(named_weights(self._policy))
            with torch.no_grad():
                for name, weight in named_weights(self._reference):
                    weight.copy_(policy[name])

    def policy_log_probs(self, batch: RolloutBatch, report: Report) -> torch.Tensor:
        return self._log_probs(self._policy, batch, report)

    def reference_log_probs(self, batch: RolloutBatch, report: Report) -> torch.Tensor | None:
        return None if self._reference is None else self._log_probs(self._reference, batch, report)

    def accumulate(
        self, batch: RolloutBatch, step: OptimizerStepPlan, tokens: TokenTensors, report: Callable[[int], None]
    ) -> list[dict[str, MetricSum]]:
        parts = []
        for number, micro_batch in enumerate(step.all_micro_batches):
            report(number)
            with_gradient = number >= len(step.observed)
            parts.append(self._forward_backward(batch, step, micro_batch, tokens, with_gradient=with_gradient))
        return parts

    def optimizer_step(self) -> float:
        config = self._config.optimizer
        set_learning_rate(self._optimizer, learning_rate(self.iteration, config, self._total_iterations))
        norm = self.loss_scale.unscale(self._optimizer)
        if norm is not None:
            clip_gradients(self._optimizer, norm, config.clip_grad)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.iteration += 1
        return 0.0 if norm is None else norm

    def _log_probs(self, model: torch.nn.Module, batch: RolloutBatch, report: Report) -> torch.Tensor:
        same_cut = self._config.algorithm.use_routing_replay  # recorded routing is kept by micro-batch
        micro_batches = (
            [m for step in batch.steps for m in step.all_micro_batches] if same_cut else batch.log_prob_micro_batches
        )
        result = torch.zeros(batch.packing.num_tokens, device=self._device)
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
        tokens: TokenTensors,
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
        loss = self.loss(batch, step, micro_batch, tokens, outputs)
        if with_gradient:
            # FSDP averages gradients over ranks; the loss is this rank's share of the step's.
            torch.autograd.backward(loss.loss * (dist.get_world_size() * self.loss_scale.value))
        return loss.metrics

    def _route(self, batch: RolloutBatch, micro_batch: MicroBatch) -> None:
        """Set the routing of the next forward: the engine's, what was recorded, or the model's own."""
        if self._replay is None:
            return
        if micro_batch.is_empty:
            self._replay.choose_freely()
        elif self._config.rollout.use_rollout_routing_replay:
            self._replay.replay(rollout_routing(batch.samples, micro_batch).to(self._device))
        elif id(micro_batch) in self._recorded:
            self._replay.replay(self._recorded[id(micro_batch)])
        else:
            self._replay.record()

    def _keep_routing(self, micro_batch: MicroBatch) -> None:
        """Remember the routing that a log-probability pass has just recorded, for the training pass."""
        if self._config.algorithm.use_routing_replay and self._replay is not None and not micro_batch.is_empty:
            self._recorded[id(micro_batch)] = self._replay.recorded()
