"""Roles as Megatron-Core models: how they are run and trained. Dims: T response tokens of this replica's samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from miles.algorithms.losses import LossOutput
from miles.algorithms.metrics import MetricSum
from miles.algorithms.token_sets import TokenSetScores
from miles.algorithms.vocab_rows import TokenLogProbs
from miles.services.trainer.backends.megatron.model.build_model import MegatronModel
from miles.services.trainer.backends.megatron.model.expert_bias import ExpertBias
from miles.services.trainer.backends.megatron.mtp.targets import TrainedTokens, trained_tokens
from miles.services.trainer.backends.megatron.mtp.training import MtpTraining
from miles.services.trainer.backends.megatron.optimizer import MegatronOptimizer
from miles.services.trainer.backends.megatron.parallel.forward_output import ForwardOutput, LogProbOutput
from miles.services.trainer.backends.megatron.parallel.groups import ParallelRank, from_last_stage
from miles.services.trainer.backends.megatron.parallel.pipeline import Pipeline, Read
from miles.services.trainer.backends.megatron.parallel.rows import LocalRows
from miles.services.trainer.backends.megatron.recording import RecordedPasses, both
from miles.services.trainer.backends.megatron.replay.step_routing import Hooks, Routing
from miles.services.trainer.batch.packing import MicroBatch
from miles.services.trainer.batch.rollout_batch import OptimizerStepPlan, RolloutBatch
from miles.services.trainer.recording.recorder import Recorder
from miles.services.trainer.step.finite_gradient import StepOutcome
from miles.services.trainer.step.progress import Progress, Report
from miles.services.trainer.step.roles import CriticLearner, Learner, OutputT, PolicyLearner
from miles.services.trainer.step.token_sets import TokenSetRequest
from miles.telemetry.tracing import traced


class MegatronLearner(Learner[OutputT]):
    """Replicas are spread over ranks; the last pipeline stage has the losses."""

    def __init__(
        self,
        model: MegatronModel,
        output: ForwardOutput[OutputT],
        optimizer: MegatronOptimizer,
        parallel: ParallelRank,
        device: torch.device,
        total_iterations: int,
        expert_bias: ExpertBias,
        routing: Routing | None = None,
        mtp: MtpTraining | None = None,
        *,
        padded: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        self._output = output
        self._parallel = parallel
        self._device = device
        self._pipeline = Pipeline(model, parallel, device, mtp, padded=padded)
        self._total_iterations = total_iterations
        self._expert_bias = expert_bias
        self._routing = routing

    @property
    def learning_rate(self) -> float:
        """See `Learner.learning_rate`."""
        return self.optimizer.rate

    @traced("forward and backward")
    def accumulate(
        self,
        batch: RolloutBatch,
        step: OptimizerStepPlan,
        loss: Callable[[MicroBatch, OutputT], LossOutput],
        report: Callable[[int], None],
    ) -> list[dict[str, MetricSum]]:
        """See `Learner.accumulate`."""
        self.optimizer.clear()
        self._expert_bias.forget()
        parts = []
        done = 0
        for micro_batches, with_gradient in ((step.observed, False), (step.micro_batches, True)):
            if micro_batches:
                trained = trained_tokens(batch, step) if with_gradient else None
                parts += self._pass(micro_batches, loss, trained, done, report)
                done += len(micro_batches)
        return parts

    @traced("optimizer step")
    def step(self) -> StepOutcome:
        """See `Learner.step`."""
        outcome = self.optimizer.step(self.iteration, self._total_iterations)
        if not outcome.skipped:
            self._expert_bias.move()
        self.iteration += 1
        return outcome

    def reset_optimizer(self) -> None:
        """See `Learner.reset_optimizer`."""
        self.optimizer.reset()

    def discard_gradients(self) -> None:
        """See `Learner.discard_gradients`; collective."""
        self.optimizer.clear()
        self._pipeline.take_mtp_metrics()

    def sync_weights(self) -> None:
        """See `Learner.sync_weights`."""
        self.optimizer.gather_parameters()

    def take_mtp_metrics(self) -> dict[str, float]:
        """See `Pipeline.take_mtp_metrics`."""
        return self._pipeline.take_mtp_metrics()

    def _pass(
        self,
        micro_batches: Sequence[MicroBatch],
        loss: Callable[[MicroBatch, OutputT], LossOutput],
        trained: TrainedTokens | None,
        done: int,
        report: Callable[[int], None],
    ) -> list[dict[str, MetricSum]]:
        def numbered_loss(number: int, outputs: OutputT) -> tuple[torch.Tensor, dict[str, MetricSum]]:
            report(done + number)
            if number >= len(micro_batches):
                return self._output.zero_loss(outputs), {}
            result = loss(micro_batches[number], outputs)
            return result.loss, result.metrics

        with_gradient = trained is not None
        hooks: Hooks = (
            {}
            if self._routing is None
            else self._routing.hooks(micro_batches, with_gradient=with_gradient, training=True)
        )
        hooks, read = self._observed(micro_batches, hooks)
        parts: list[dict[str, MetricSum]] = self._pipeline.run(
            micro_batches,
            read,
            numbered_loss,
            with_gradient=with_gradient,
            trained=trained,
            **hooks,
        )
        if self._routing is not None:
            self._routing.finish()
        return parts

    def _observed(self, micro_batches: Sequence[MicroBatch], hooks: Hooks) -> tuple[Hooks, Read[OutputT]]:
        """What a training pass calls around forward passes, and to read their output."""
        return hooks, self._output.for_loss

    def _per_token(self, batch: RolloutBatch, report: Report, routing: Routing | None) -> torch.Tensor:
        """The log-probability or value of each of this replica's response tokens, without gradient; float32 [T]."""
        return self._pass_without_gradient(batch, (), self._output.per_token, report, routing)

    def _pass_without_gradient(
        self,
        batch: RolloutBatch,
        columns: tuple[int, ...],
        read: Read[torch.Tensor],
        report: Report,
        routing: Routing | None,
    ) -> torch.Tensor:
        """What is read at each of this replica's response tokens; float32 [T, *columns]."""
        micro_batches: Sequence[MicroBatch] = batch.log_prob_micro_batches
        if routing is not None and routing.keeps:  # by micro-batch, so it takes those of the training pass
            micro_batches = batch.micro_batches
        result = torch.zeros(batch.packing.num_tokens, *columns, device=self._device)

        def keep(number: int, values_R: torch.Tensor) -> tuple[torch.Tensor, Any]:
            report(Progress("log_probs", min(number, len(micro_batches)), len(micro_batches)))
            if number < len(micro_batches):
                result[batch.token_indices(micro_batches[number]).to(result.device)] = values_R
            return values_R.sum(), None

        hooks: Hooks = {} if routing is None else routing.hooks(micro_batches, with_gradient=False, training=False)
        with torch.no_grad():
            self._pipeline.run(micro_batches, read, keep, with_gradient=False, **hooks)
        if routing is not None:
            routing.finish()
        return from_last_stage(result, self._parallel)


class MegatronPolicy(MegatronLearner[TokenLogProbs], PolicyLearner):
    """The policy."""

    _output: LogProbOutput
    _recorded: RecordedPasses | None = None

    def record(self, recorder: Recorder) -> None:
        """See `PolicyLearner.record`."""
        self._recorded = RecordedPasses(recorder, self.model, self._parallel, self._output, self._device)

    def _observed(self, micro_batches: Sequence[MicroBatch], hooks: Hooks) -> tuple[Hooks, Read[TokenLogProbs]]:
        recorded, for_loss = self._recorded, self._output.for_loss
        if recorded is None:
            return hooks, for_loss

        def read(output_1RV: torch.Tensor, micro_batch: MicroBatch, rows: LocalRows) -> TokenLogProbs:
            recorded.read_top(output_1RV, micro_batch, rows)  # first: the loss works in the memory of the logits
            return for_loss(output_1RV, micro_batch, rows)

        return both(hooks, recorded.hooks(micro_batches)), read

    def compute_log_probs(self, batch: RolloutBatch, report: Report) -> torch.Tensor:
        """See `LogProbRole.compute_log_probs`; routed as in training."""
        return self._per_token(batch, report, self._routing)

    def compute_log_probs_and_squares(self, batch: RolloutBatch, report: Report) -> torch.Tensor:
        """See `PolicyLearner.compute_log_probs_and_squares`."""
        return self._pass_without_gradient(batch, (2,), self._output.with_squares, report, self._routing)

    def compute_log_probs_unrouted(self, batch: RolloutBatch, report: Report) -> torch.Tensor:
        """The same with routers that choose freely: for weights that did not generate the samples."""
        return self._per_token(batch, report, None)

    def score_token_sets(self, batch: RolloutBatch, request: TokenSetRequest, report: Report) -> TokenSetScores:
        """See `TokenSetRole.score_token_sets`; routed as in training."""
        return self._score_sets(batch, request, report, self._routing)

    def score_token_sets_unrouted(
        self, batch: RolloutBatch, request: TokenSetRequest, report: Report
    ) -> TokenSetScores:
        """The same with routers that choose freely."""
        return self._score_sets(batch, request, report, None)

    def _score_sets(
        self, batch: RolloutBatch, request: TokenSetRequest, report: Report, routing: Routing | None
    ) -> TokenSetScores:
        output = self._output
        assert isinstance(output, LogProbOutput), "a policy has tokens"

        def read(output_1RV: torch.Tensor, micro_batch: MicroBatch, rows: LocalRows) -> torch.Tensor:
            tokens_RM = request.tokens_at(batch.token_indices(micro_batch))
            return output.token_sets(output_1RV, micro_batch, rows, tokens_RM, request.top_k)

        joined_TX = self._pass_without_gradient(batch, (request.columns,), read, report, routing)
        return TokenSetScores.from_joined(joined_TX, request.top_k)


class MegatronCritic(MegatronLearner[torch.Tensor], CriticLearner):
    """The critic."""

    def compute_values(self, batch: RolloutBatch, report: Report) -> torch.Tensor:
        """See `CriticLearner.compute_values`."""
        return self._per_token(batch, report, self._routing)
