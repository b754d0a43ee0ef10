"""Roles held as Hugging Face models under FSDP2. Dims: R response tokens of a micro-batch, T those of this rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from miles.algorithms.losses import LossOutput
from miles.algorithms.metrics import MetricSum
from miles.services.trainer.backends.fsdp.lora.layers import without_adapters
from miles.services.trainer.backends.fsdp.model.sharded_model import named_weights
from miles.services.trainer.backends.fsdp.optimizer import (
    LossScale,
    build_optimizer,
    clip_gradients,
    set_learning_rate,
)
from miles.services.trainer.backends.fsdp.replay.step_routing import Routing
from miles.services.trainer.batch.packing import MicroBatch
from miles.services.trainer.batch.rollout_batch import OptimizerStepPlan, RolloutBatch
from miles.services.trainer.step.learning_rate import learning_rate
from miles.services.trainer.step.progress import Progress, Report
from miles.services.trainer.step.roles import Learner, OutputT

if TYPE_CHECKING:
    from miles.config.sections.optimizer import OptimizerConfig


_OutputT_co = TypeVar("_OutputT_co", covariant=True)


class Reading(Protocol[_OutputT_co]):
    """What is read off a model for each response token."""

    device: torch.device

    def outputs(self, model: torch.nn.Module, micro_batch: MicroBatch) -> _OutputT_co:
        """All that a loss needs."""

    def numbers(self, model: torch.nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
        """The one number that `Role.evaluate` gives; float32 [R]."""


class FsdpLearner(Learner[OutputT]):
    """Every rank is a replica; FSDP averages the gradients."""

    def __init__(
        self,
        model: torch.nn.Module,
        reading: Reading[OutputT],
        config: OptimizerConfig,
        total_iterations: int,
        *,
        scale_loss: bool,
        routing: Routing | None = None,
    ) -> None:
        """`scale_loss` keeps gradients inside the range of float16."""
        super().__init__()
        self.model = model
        self.optimizer = build_optimizer(model, config)
        self.loss_scale = LossScale(dynamic=scale_loss)
        self._reading = reading
        self._config = config
        self._total_iterations = total_iterations
        self._routing = routing

    @property
    def learning_rate(self) -> float:
        """See `Learner.learning_rate`."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def evaluate(self, batch: RolloutBatch, report: Report) -> torch.Tensor:
        """See `Role.evaluate`."""
        return _evaluate(self.model, self._reading, batch, report, self._routing)

    def accumulate(
        self,
        batch: RolloutBatch,
        step: OptimizerStepPlan,
        loss: Callable[[MicroBatch, OutputT], LossOutput],
        report: Callable[[int], None],
    ) -> list[dict[str, MetricSum]]:
        """See `Learner.accumulate`."""
        parts = []
        for number, micro_batch in enumerate(step.all_micro_batches):
            report(number)
            with_gradient = number >= len(step.observed)
            if self._routing is not None:
                self._routing.before(batch, micro_batch)
            with torch.set_grad_enabled(with_gradient):
                outputs = self._reading.outputs(self.model, micro_batch)
            result = loss(micro_batch, outputs)
            if with_gradient:
                # FSDP averages gradients over ranks; the loss is this rank's share of the step's.
                torch.autograd.backward(result.loss * (dist.get_world_size() * self.loss_scale.value))
            parts.append(result.metrics)
        return parts

    def step(self) -> float:
        """See `Learner.step`; 0 for a step that float16 overflow skipped."""
        set_learning_rate(self.optimizer, learning_rate(self.iteration, self._config, self._total_iterations))
        norm = self.loss_scale.unscale(self.optimizer)
        if norm is not None:
            clip_gradients(self.optimizer, norm, self._config.clip_grad)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.iteration += 1
        return 0.0 if norm is None else norm

    def discard(self) -> None:
        """See `Learner.discard`."""
        self.optimizer.zero_grad(set_to_none=True)


def local_weights(model: torch.nn.Module, *, trained_only: bool = False) -> list[tuple[str, torch.Tensor]]:
    """Name and this rank's part of every weight, or of those that are trained; writing to them changes the model.

    Going through `state_dict` has FSDP let go of weights that it has gathered, which would be out of date.
    """
    chosen = [(name, w) for name, w in named_weights(model) if w.requires_grad or not trained_only]
    parts = [(name, weight.detach()) for name, weight in chosen]
    return [(name, part.to_local() if isinstance(part, DTensor) else part) for name, part in parts]


class FrozenModel:
    """A model of its own that does not learn."""

    def __init__(self, model: torch.nn.Module, reading: Reading[Any], policy: torch.nn.Module) -> None:
        self.model = model
        self._reading = reading
        self._policy = policy

    def evaluate(self, batch: RolloutBatch, report: Report) -> torch.Tensor:
        """See `Role.evaluate`."""
        return _evaluate(self.model, self._reading, batch, report, None)

    @torch.no_grad()
    def follow(self) -> None:
        """See `Reference.follow`."""
        policy = dict(named_weights(self._policy))
        for name, weight in named_weights(self.model):
            weight.copy_(policy[name])


class AdaptedBase:
    """The reference of a policy of which adapters are trained: the same model with its adapters off."""

    def __init__(self, model: torch.nn.Module, reading: Reading[Any], routing: Routing | None) -> None:
        """`routing` is the policy's: the base routes freely."""
        self.model = model
        self._reading = reading
        self._routing = routing

    def evaluate(self, batch: RolloutBatch, report: Report) -> torch.Tensor:
        """See `Role.evaluate`."""
        if self._routing is not None:
            self._routing.let_go()
        with without_adapters(self.model):
            return _evaluate(self.model, self._reading, batch, report, None)

    def follow(self) -> None:
        """Never asked for: ref_update_interval and adapters exclude each other."""
        raise RuntimeError("the base of an adapter does not change")


def _evaluate(
    model: torch.nn.Module, reading: Reading[Any], batch: RolloutBatch, report: Report, routing: Routing | None
) -> torch.Tensor:
    micro_batches: Sequence[MicroBatch] = batch.log_prob_micro_batches
    if routing is not None and routing.keeps:  # by micro-batch, so it takes those of the training pass
        micro_batches = batch.micro_batches
    result = torch.zeros(batch.packing.num_tokens, device=reading.device)
    for done, micro_batch in enumerate(micro_batches):
        report(Progress("log_probs", done, len(micro_batches)))
        if routing is not None:
            routing.before(batch, micro_batch)
        with torch.no_grad():
            numbers_R = reading.numbers(model, micro_batch)
        result[batch.place(micro_batch).to(result.device)] = numbers_R
        if routing is not None:
            routing.after(micro_batch)
    return result
