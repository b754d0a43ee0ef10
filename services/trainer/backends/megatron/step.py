"""One rollout's training with Megatron-Core. Dims: T response tokens of this replica's samples."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from miles.algorithms.log_probs import TokenLogProbs
from miles.algorithms.metrics import MetricSum, reduce_metrics
from miles.services.trainer.backend import Progress
from miles.services.trainer.backends.megatron.copies import WeightCopy
from miles.services.trainer.backends.megatron.groups import Place, from_last_stage
from miles.services.trainer.backends.megatron.optimizer import MegatronOptimizer
from miles.services.trainer.backends.megatron.pipeline import PassOptions, Pipeline
from miles.services.trainer.backends.megatron.routing import Hooks, Routing
from miles.services.trainer.batch import OptimizerStepPlan, RolloutBatch
from miles.services.trainer.packing import MicroBatch
from miles.services.trainer.rollout_step import Report, RolloutTrainer, TokenTensors

if TYPE_CHECKING:
    from miles.config import JobConfig


class MegatronTrainer(RolloutTrainer):
    """Replicas are spread over ranks; the last pipeline stage has the losses."""

    def __init__(
        self,
        config: JobConfig,
        pipeline: Pipeline,
        optimizer: MegatronOptimizer,
        place: Place,
        *,
        reference: WeightCopy | None,
        routing: Routing | None,
        options: PassOptions,
        total_iterations: int,
    ) -> None:
        super().__init__(config, place.data, options.device)
        self._pipeline = pipeline
        self._optimizer = optimizer
        self._place = place
        self._reference = reference
        self._routing = routing
        self._options = options
        self._total_iterations = total_iterations

    @property
    def learning_rate(self) -> float:
        return self._optimizer.rate

    def begin(self, batch: RolloutBatch) -> None:
        if self._routing is not None:
            self._routing.begin(batch)

    def update_reference(self) -> None:
        """Make the reference equal to the policy as it is."""
        if self._reference is not None:
            self._reference.take()

    def policy_log_probs(self, batch: RolloutBatch, report: Report) -> torch.Tensor:
        return self._log_probs(batch, report, self._routing)

    def reference_log_probs(self, batch: RolloutBatch, report: Report) -> torch.Tensor | None:
        if self._reference is None:
            return None
        with self._reference.in_place():
            return self._log_probs(batch, report, None)

    def accumulate(
        self, batch: RolloutBatch, step: OptimizerStepPlan, tokens: TokenTensors, report: Callable[[int], None]
    ) -> list[dict[str, MetricSum]]:
        self._optimizer.clear()
        algorithm = self._config.algorithm
        options = dataclasses.replace(
            self._options,
            with_entropy=algorithm.entropy_coef != 0 or algorithm.observe_training_entropy,
            entropy_requires_grad=algorithm.entropy_coef != 0,
        )
        parts = []
        done = 0
        for micro_batches, with_gradient in ((step.observed, False), (step.micro_batches, True)):
            if micro_batches:
                parts += self._pass(batch, step, micro_batches, tokens, options, with_gradient, done, report)
                done += len(micro_batches)
        if tokens.train is None:  # what the last stage saw is for the other stages' records too
            from_last_stage(tokens.seen, self._place)
        return parts

    def optimizer_step(self) -> float:
        norm = self._optimizer.step(self.iteration, self._total_iterations)
        self.iteration += 1
        return norm

    def reduce(self, parts: Sequence[dict[str, MetricSum]]) -> dict[str, float]:
        means = reduce_metrics(parts, self._data_ranks.group) if self._place.is_last_stage else {}
        metrics = _share(means, self._place)
        return metrics if self._routing is None else metrics | self._routing.metrics(self._place)

    def _pass(
        self,
        batch: RolloutBatch,
        step: OptimizerStepPlan,
        micro_batches: Sequence[MicroBatch],
        tokens: TokenTensors,
        options: PassOptions,
        with_gradient: bool,
        done: int,
        report: Callable[[int], None],
    ) -> list[dict[str, MetricSum]]:
        def loss(number: int, outputs: TokenLogProbs) -> tuple[torch.Tensor, dict[str, MetricSum]]:
            report(done + number)
            if number >= len(micro_batches):  # fills up the schedule
                return outputs.log_probs_T.sum(), {}
            result = self.loss(batch, step, micro_batches[number], tokens, outputs)
            return result.loss, result.metrics

        hooks: Hooks = {} if self._routing is None else self._routing.hooks(micro_batches, with_gradient=with_gradient)
        parts: list[dict[str, MetricSum]] = self._pipeline.run(
            micro_batches, loss, options, with_gradient=with_gradient, **hooks
        )
        if self._routing is not None:
            self._routing.finish()
        return parts

    def _log_probs(self, batch: RolloutBatch, report: Report, routing: Routing | None) -> torch.Tensor:
        same_cut = self._config.algorithm.use_routing_replay  # recorded routing is kept by micro-batch
        micro_batches: Sequence[MicroBatch] = (
            [m for step in batch.steps for m in step.all_micro_batches] if same_cut else batch.log_prob_micro_batches
        )
        result = torch.zeros(batch.packing.num_tokens, device=self._device)

        def keep(number: int, outputs: TokenLogProbs) -> tuple[torch.Tensor, Any]:
            report(Progress("log_probs", min(number, len(micro_batches)), len(micro_batches)))
            if number < len(micro_batches):
                result[batch.place(micro_batches[number]).to(result.device)] = outputs.log_probs_T
            return outputs.log_probs_T.sum(), None

        hooks: Hooks = {} if routing is None else routing.hooks(micro_batches, with_gradient=False)
        with torch.no_grad():
            self._pipeline.run(micro_batches, keep, self._options, with_gradient=False, **hooks)
        if routing is not None:
            routing.finish()
        return from_last_stage(result, self._place)


def _share(metrics: dict[str, float], place: Place) -> dict[str, float]:
    """The last stage's metrics on every stage."""
    if place.pipeline_size == 1:
        return metrics
    device = "cuda" if dist.get_backend(place.pipeline_group) == "nccl" else "cpu"
    text = torch.frombuffer(bytearray(json.dumps(metrics).encode()), dtype=torch.uint8).to(device)
    size = from_last_stage(torch.tensor([len(text)], device=device), place)
    buffer = text if place.is_last_stage else torch.empty(int(size), dtype=torch.uint8, device=device)
    shared: dict[str, float] = json.loads(from_last_stage(buffer, place).cpu().numpy().tobytes())
    return shared
