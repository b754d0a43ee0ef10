"""Roles as Hugging Face models: how they are run and trained.

Dims: R response tokens of a micro-batch, T those of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from miles.algorithms.losses import LossOutput
from miles.algorithms.metrics import MetricSum
from miles.algorithms.token_sets import TokenSetScores
from miles.algorithms.vocab_rows import TokenLogProbs
from miles.services.trainer.backends.fsdp.forward_passes import ForwardPass, forward_batch, score_sets
from miles.services.trainer.backends.fsdp.lora.layers import without_adapters
from miles.services.trainer.backends.fsdp.model.forward import LogProbForward
from miles.services.trainer.backends.fsdp.model.sharded_model import free_gathered, named_weights
from miles.services.trainer.backends.fsdp.model.working_weights import WorkingWeights
from miles.services.trainer.backends.fsdp.optimizer import (
    LossScale,
    broken_gradients,
    build_optimizer,
    clip_gradients,
    set_learning_rate,
)
from miles.services.trainer.backends.fsdp.recording import RecordedForward
from miles.services.trainer.backends.fsdp.replay.step_routing import Routing
from miles.services.trainer.batch.packing import MicroBatch
from miles.services.trainer.batch.rollout_batch import OptimizerStepPlan, RolloutBatch
from miles.services.trainer.recording.recorder import Recorder
from miles.services.trainer.step import adam_state
from miles.services.trainer.step.finite_gradient import StepOutcome
from miles.services.trainer.step.learning_rate import learning_rate
from miles.services.trainer.step.progress import Report
from miles.services.trainer.step.roles import CriticLearner, Learner, OutputT, PolicyLearner
from miles.services.trainer.step.token_sets import TokenSetRequest
from miles.telemetry.tracing import span, traced

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from miles.config.sections.optimizer import OptimizerConfig


class FsdpLearner(Learner[OutputT]):
    """Every rank is a replica; FSDP averages the gradients."""

    def __init__(
        self,
        model: torch.nn.Module,
        weights: WorkingWeights,
        forward: ForwardPass[OutputT],
        config: OptimizerConfig,
        total_iterations: int,
        *,
        scale_loss: bool,
        one_graph: bool = False,
        routing: Routing | None = None,
    ) -> None:
        """`scale_loss` keeps gradients inside the range of float16. `one_graph` runs micro-batches that are only
        observed as those that are trained on, so that the model is not compiled once more."""
        super().__init__()
        self.model = model
        self.weights = weights
        self.optimizer = build_optimizer(model, config)
        self.loss_scale = LossScale(dynamic=scale_loss)
        self._forward = forward
        self._config = config
        self._total_iterations = total_iterations
        self._one_graph = one_graph
        self._routing = routing

    @property
    def learning_rate(self) -> float:
        """See `Learner.learning_rate`."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    @traced("forward and backward")
    def accumulate(
        self,
        batch: RolloutBatch,
        step: OptimizerStepPlan,
        loss: Callable[[MicroBatch, OutputT], LossOutput],
        report: Callable[[int], None],
    ) -> list[dict[str, MetricSum]]:
        """See `Learner.accumulate`."""
        parts = []
        with self.weights.in_use():
            for number, micro_batch in enumerate(step.all_micro_batches):
                report(number)
                observed = number < len(step.observed)
                joins = not step.joined.isdisjoint(micro_batch.samples)
                if joins:
                    parts += self._accumulate_joined(batch, micro_batch, loss, step.joined)
                else:
                    parts.append(self._accumulate(batch, micro_batch, loss, with_gradient=not observed))
        return parts

    def _accumulate_joined(
        self,
        batch: RolloutBatch,
        micro_batch: MicroBatch,
        loss: Callable[[MicroBatch, OutputT], LossOutput],
        joined: Collection[int],
    ) -> list[dict[str, MetricSum]]:
        """Run a micro-batch that has samples without gradient. They leave it where a log-probability is not finite:
        zero times what is behind that would be NaN in the gradient."""
        result, outputs = self._run(batch, micro_batch, loss, with_gradient=True)
        if bool(_all_finite(outputs)):
            self._backward(result)
            return [result.metrics]
        del result, outputs
        self._forget(micro_batch)
        trained, idle = batch.apart(micro_batch, joined)
        return [
            self._accumulate(batch, idle, loss, with_gradient=False),
            self._accumulate(batch, trained, loss, with_gradient=True),
        ]

    def _accumulate(
        self,
        batch: RolloutBatch,
        micro_batch: MicroBatch,
        loss: Callable[[MicroBatch, OutputT], LossOutput],
        *,
        with_gradient: bool,
    ) -> dict[str, MetricSum]:
        result, _ = self._run(batch, micro_batch, loss, with_gradient=with_gradient)
        if with_gradient:
            self._backward(result)
        return result.metrics

    def _run(
        self,
        batch: RolloutBatch,
        micro_batch: MicroBatch,
        loss: Callable[[MicroBatch, OutputT], LossOutput],
        *,
        with_gradient: bool,
    ) -> tuple[LossOutput, OutputT]:
        if self._routing is not None:
            self._routing.before(batch, micro_batch, training=True)
        with span("forward"), torch.set_grad_enabled(with_gradient or self._one_graph):
            outputs = self._for_loss(micro_batch)
        if self._routing is not None:
            self._routing.after(micro_batch)
        with span("loss"):
            return loss(micro_batch, outputs), outputs

    def _for_loss(self, micro_batch: MicroBatch) -> OutputT:
        return self._forward.for_loss(self.model, micro_batch)

    def _forget(self, micro_batch: MicroBatch) -> None:
        """Discard what was kept of a micro-batch, whose samples are run again."""

    @traced("backward")
    def _backward(self, result: LossOutput) -> None:
        # FSDP averages gradients over ranks; the loss is this rank's share of the step's.
        torch.autograd.backward(result.loss * (dist.get_world_size() * self.loss_scale.value))

    @traced("optimizer step")
    def step(self) -> StepOutcome:
        """See `Learner.step`."""
        set_learning_rate(self.optimizer, learning_rate(self.iteration, self._config, self._total_iterations))
        norm = self.loss_scale.unscale(self.optimizer)
        outcome = StepOutcome(norm)
        if math.isfinite(norm):
            clip_gradients(self.optimizer, norm, self._config.clip_grad)
            self.optimizer.step()
        elif self.loss_scale.back_off():
            outcome = StepOutcome(norm, skipped=True, scale_overflowed=True)
        else:
            outcome = StepOutcome(norm, skipped=True, broken=broken_gradients(self.model))
        self.optimizer.zero_grad(set_to_none=True)
        self.iteration += 1
        return outcome

    def reset_optimizer(self) -> None:
        """See `Learner.reset_optimizer`."""
        adam_state.reset(self.optimizer)

    def discard_gradients(self) -> None:
        """See `Learner.discard_gradients`."""
        self.optimizer.zero_grad(set_to_none=True)

    def _per_token(self, batch: RolloutBatch, report: Report) -> torch.Tensor:
        return forward_batch(self.model, self.weights, self._forward, batch, report, self._routing)


class FsdpPolicy(FsdpLearner[TokenLogProbs], PolicyLearner):
    """The policy."""

    model: PreTrainedModel
    _forward: LogProbForward
    _recorder: Recorder | None = None
    _recorded: RecordedForward | None = None

    def record(self, recorder: Recorder) -> None:
        """Have training passes give the recorder what it wants. Raises ValueError for layers that are not there."""
        self._recorder = recorder
        self._recorded = RecordedForward(recorder, self.model, self._forward)

    def _for_loss(self, micro_batch: MicroBatch) -> TokenLogProbs:
        return super()._for_loss(micro_batch) if self._recorded is None else self._recorded.for_loss(micro_batch)

    def _forget(self, micro_batch: MicroBatch) -> None:
        if self._recorder is not None:
            self._recorder.forget(micro_batch)

    def compute_log_probs(self, batch: RolloutBatch, report: Report) -> torch.Tensor:
        """See `LogProbRole.compute_log_probs`."""
        return self._per_token(batch, report)

    def compute_log_probs_and_squares(self, batch: RolloutBatch, report: Report) -> torch.Tensor:
        """See `PolicyLearner.compute_log_probs_and_squares`."""
        forward, columns = self._forward, (2,)
        return forward_batch(
            self.model, self.weights, forward, batch, report, self._routing, forward.with_squares, columns
        )

    def score_token_sets(self, batch: RolloutBatch, request: TokenSetRequest, report: Report) -> TokenSetScores:
        """See `TokenSetRole.score_token_sets`; routed as in `compute_log_probs`."""
        return score_sets(self.model, self.weights, self._forward, batch, request, report, self._routing)


class FsdpCritic(FsdpLearner[torch.Tensor], CriticLearner):
    """The critic."""

    def compute_values(self, batch: RolloutBatch, report: Report) -> torch.Tensor:
        """See `CriticLearner.compute_values`."""
        return self._per_token(batch, report)


def _all_finite(outputs: Any) -> torch.Tensor:
    """Whether every log-probability or value is; bool, 0-d. A row in which anything is infinite or NaN gives NaN."""
    values_R = outputs.log_probs_T if isinstance(outputs, TokenLogProbs) else outputs
    return values_R.detach().isfinite().all()


def local_weights(model: torch.nn.Module, *, trained_only: bool = False) -> list[tuple[str, torch.Tensor]]:
    """Name and this rank's part of every weight, or of those that are trained; writing to them changes the model.

    Going through `state_dict` makes FSDP free the weights that it has gathered, which would be out of date.
    """
    chosen = [(name, w) for name, w in named_weights(model) if w.requires_grad or not trained_only]
    parts = [(name, weight.detach()) for name, weight in chosen]
    return [(name, part.to_local() if isinstance(part, DTensor) else part) for name, part in parts]


class FrozenModel:
    """A separate model that is not trained."""

    def __init__(
        self,
        model: torch.nn.Module,
        weights: WorkingWeights,
        forward: ForwardPass[Any],
        policy: torch.nn.Module,
        *,
        frees: bool = False,
    ) -> None:
        """With `frees`, what a pass has gathered from host memory is freed after it."""
        self.model = model
        self._frees = frees
        self._weights = weights
        self._forward = forward
        self._policy = policy

    def compute_log_probs(self, batch: RolloutBatch, report: Report) -> torch.Tensor:
        """See `LogProbRole.compute_log_probs`."""
        log_probs_T = forward_batch(self.model, self._weights, self._forward, batch, report, None)
        if self._frees:
            free_gathered(self.model)
        return log_probs_T

    def score_token_sets(self, batch: RolloutBatch, request: TokenSetRequest, report: Report) -> TokenSetScores:
        """See `TokenSetRole.score_token_sets`."""
        scores = score_sets(self.model, self._weights, self._forward, batch, request, report, None)
        if self._frees:
            free_gathered(self.model)
        return scores

    @torch.no_grad()
    def follow(self) -> None:
        """See `Reference.follow`."""
        policy = dict(named_weights(self._policy))
        for name, weight in named_weights(self.model):
            weight.copy_(policy[name])


class AdaptedBase:
    """The reference of a policy of which adapters are trained: the same model with its adapters off."""

    def __init__(
        self, model: torch.nn.Module, weights: WorkingWeights, forward: ForwardPass[Any], routing: Routing | None
    ) -> None:
        """`weights` and `routing` are the policy's; the base routes freely."""
        self.model = model
        self._weights = weights
        self._forward = forward
        self._routing = routing

    def compute_log_probs(self, batch: RolloutBatch, report: Report) -> torch.Tensor:
        """See `LogProbRole.compute_log_probs`."""
        if self._routing is not None:
            self._routing.choose_freely()
        with without_adapters(self.model):
            return forward_batch(self.model, self._weights, self._forward, batch, report, None)

    def follow(self) -> None:
        """Never called: ref_update_interval and adapters exclude each other."""
        raise RuntimeError("the base of an adapter does not change")
