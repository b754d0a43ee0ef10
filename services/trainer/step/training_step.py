"""One rollout's training with any backend: prepare advantages, then take the optimizer steps.

Dims: N samples of the rollout, T response tokens of this rank.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic

import torch
import torch.distributed as dist

from miles.algorithms.losses import LossOutput
from miles.algorithms.metrics import MetricSum
from miles.services.trainer.batch.packing import MicroBatch
from miles.services.trainer.batch.rollout_batch import OptimizerStepPlan, RolloutBatch, cut_batch, in_order
from miles.services.trainer.batch.rollout_schedule import RolloutSchedule, schedule_rollout
from miles.services.trainer.checkpoint.random_state import random_state, set_random_state
from miles.services.trainer.ranks.abandoning import Abandonment, StepAbandonedError
from miles.services.trainer.recording.recorder import Recorder
from miles.services.trainer.step import algorithm_options
from miles.services.trainer.step.data_ranks import DataRanks
from miles.services.trainer.step.finite_gradient import SkippedSteps, StepOutcome
from miles.services.trainer.step.gradient_norms import GradientNorm
from miles.services.trainer.step.loss_denominator import untrained_counts
from miles.services.trainer.step.micro_batch_losses import StepLosses
from miles.services.trainer.step.preparation import Preparation, TokenTensors
from miles.services.trainer.step.progress import Progress, Report
from miles.services.trainer.step.roles import Learner, OutputT, Roles
from miles.services.trainer.step.train_data_dump import write_train_data
from miles.types import SampleGroup

if TYPE_CHECKING:
    from miles.config import JobConfig

RecordSamples = Callable[..., None]
"""Takes the batch and, by keyword, the tensors that `recorded_samples` takes."""


@dataclasses.dataclass(frozen=True, slots=True)
class _TrainingPass(Generic[OutputT]):
    """The training of one learner on a rollout."""

    prefix: str
    """Prefix of its metrics' names."""
    learner: Learner[OutputT]
    loss: Callable[[RolloutBatch, OptimizerStepPlan, TokenTensors, MicroBatch, OutputT], LossOutput]


class RolloutTrainer(abc.ABC):
    """Trains the policy and the critic, rollout by rollout; every rank makes the same calls."""

    reports_together = False
    """Whether all ranks report at the same points, between two micro-batches, so that a step can be abandoned there."""
    joined_tokens = 0
    """How many tokens of samples without gradient may be computed with gradient; see `schedule_rollout`."""

    def __init__(self, config: JobConfig, roles: Roles, data_ranks: DataRanks, device: torch.device) -> None:
        self.roles = roles
        self.replica = data_ranks.rank
        """The number of the replica whose samples this rank computes."""
        self._config = config
        self._data_ranks = data_ranks
        self._preparation = Preparation(config, roles, data_ranks, device)
        self._losses = StepLosses(config, device)
        self.gradient_norms: list[GradientNorm] = []
        """Of the last rollout's optimizer steps that were taken; the same on every rank."""
        allowed = config.optimizer.max_nonfinite_steps
        self._skipped = {"": SkippedSteps("policy", allowed), "critic_": SkippedSteps("critic", allowed)}
        self.warnings: list[str] = []
        """What a person should know of the last rollout's training."""
        self.recorder: Recorder | None = None
        """Of what the draft model learns from; None when none is trained."""

    def record_with(self, recorder: Recorder | None) -> None:
        """Have what the policy computes be recorded. Raises ValueError for layers that it does not have."""
        self.recorder = recorder
        if recorder is not None:
            self.roles.policy.record(recorder)

    @abc.abstractmethod
    def reduce(self, parts: Sequence[dict[str, MetricSum]]) -> dict[str, float]:
        """Means of the metrics, the same on every rank."""

    def begin(self, batch: RolloutBatch) -> None:  # noqa: B027  (optional)
        """Called once before anything is computed on a rollout."""

    def schedule(self, groups: Sequence[SampleGroup]) -> RolloutSchedule:
        """Decide which replica trains on which samples; needs all of every sample, and no other rank."""
        samples = in_order(groups)
        idle: frozenset[int] = frozenset()
        if algorithm_options.zero_reward_is_zero_gradient(self._config):
            idle = frozenset(self._preparation.shaped_rewards(samples).eq(0).nonzero().flatten().tolist())
        return schedule_rollout(samples, self._config, self._data_ranks.count, idle, self.joined_tokens)

    def train(
        self,
        number: int,
        groups: Sequence[SampleGroup],
        report: Report,
        record: RecordSamples | None = None,
        abandonment: Abandonment | None = None,
        schedule: RolloutSchedule | None = None,
    ) -> dict[str, float]:
        """Take the optimizer steps of one rollout; returns metrics by name, the same on every rank.

        `number` counts rollouts from 0, so it is the policy's version. `record` is called at the end with the tensors
        of this rank's samples. `schedule` is what `schedule` gave on a rank that has all samples; without it, this
        rank has them. Raises StepAbandonedError, with everything as it was, when `abandonment` is requested
        before the first optimizer step.
        """
        abandonment = abandonment or Abandonment()
        passes = self._passes(number)
        before = random_state()
        try:
            schedule = schedule or self.schedule(groups)
            batch = cut_batch(in_order(groups), self._config, self.replica, schedule)
            if self.recorder is not None:
                self.recorder.begin(number, batch, schedule)
            return self._train(number, batch, passes, self._abandonable(report, abandonment), record, abandonment)
        except StepAbandonedError:
            for training in passes:
                training.learner.discard_gradients()
            if self.recorder is not None:
                self.recorder.abandon()
            set_random_state(before)
            raise

    def _abandonable(self, report: Report, abandonment: Abandonment) -> Report:
        """`report`, with a check whether to abandon the step wherever all ranks report together."""
        if not self.reports_together:
            return report

        def check_and_report(progress: Progress) -> None:
            abandonment.check()
            report(progress)

        return check_and_report

    def _train(
        self,
        number: int,
        batch: RolloutBatch,
        passes: Sequence[_TrainingPass[Any]],
        report: Report,
        record: RecordSamples | None,
        abandonment: Abandonment,
    ) -> dict[str, float]:
        began = time.monotonic()
        self.warnings = []
        rewards_N = self._preparation.shaped_rewards(batch.samples)
        self.begin(batch)
        tokens = self._preparation.prepare(number, batch, rewards_N, report, abandonment)
        prepared = time.monotonic()
        metrics = self._take_steps(number, batch, tokens, passes, report, abandonment)
        if record is not None:
            record(
                batch,
                mask_T=tokens.mask,
                advantages_T=tokens.advantages,
                train_log_probs_T=tokens.seen,
                rollout_log_probs_T=tokens.rollout,
            )
        if self._config.debug.save_debug_train_data is not None:
            template, rank = self._config.debug.save_debug_train_data, dist.get_rank()
            write_train_data(template, number, rank, batch, tokens)
        interval = self._config.algorithm.ref_update_interval
        if self.roles.reference is not None and interval is not None and (number + 1) % interval == 0:
            self.roles.reference.follow()
        if self.recorder is not None:
            metrics |= self.recorder.finish()
            self.warnings += self.recorder.warnings
        return metrics | {"perf/log_probs_time": prepared - began}

    def _passes(self, number: int) -> list[_TrainingPass[Any]]:
        """Which learners this rollout trains, and with which loss."""
        passes: list[_TrainingPass[Any]] = []
        if not algorithm_options.trains_critic_only(self._config, number):
            passes.append(_TrainingPass("", self.roles.policy, self._losses.policy))
        if self.roles.critic is not None:
            passes.append(_TrainingPass("critic_", self.roles.critic, self._losses.critic))
        return passes

    def _take_steps(
        self,
        number: int,
        batch: RolloutBatch,
        tokens: TokenTensors,
        passes: Sequence[_TrainingPass[Any]],
        report: Report,
        abandonment: Abandonment,
    ) -> dict[str, float]:
        """Metrics of all optimizer steps, the same on every rank."""
        parts = [tokens.metrics]
        outcomes: dict[str, list[StepOutcome]] = {training.prefix: [] for training in passes}
        count = len(batch.micro_batches) * len(passes)
        done = 0
        per_token = self._config.algorithm.calculate_per_token_loss
        for step in batch.steps:
            for training in passes:
                before = done

                def report_done(number: int, before: int = before) -> None:
                    report(Progress("forward_backward", min(before + number, count), count))

                loss = functools.partial(training.loss, batch, step, tokens)
                records = self.recorder if training.learner is self.roles.policy and step is batch.steps[0] else None
                with contextlib.nullcontext() if records is None else records.recording():
                    own = training.learner.accumulate(batch, step, loss, report_done)
                parts += own
                if self._data_ranks.rank == 0:
                    parts.append(untrained_counts(own, step, per_token=per_token))
                done += len(step.all_micro_batches)
                report(Progress("optimizer", done, count))
                if not any(outcomes.values()):
                    abandonment.commit()
                    if self.roles.old_policies is not None:
                        self.roles.old_policies.keep(number)
                if records is not None:
                    records.write()
                outcome = training.learner.step()
                if records is not None and outcome.skipped:
                    records.skip()
                outcomes[training.prefix].append(outcome)
                if (words := self._skipped[training.prefix].note(outcome)) is not None:
                    self.warnings.append(words)
        metrics = self.reduce(parts)
        self.gradient_norms = [
            GradientNorm("critic" if prefix else "actor", step, outcome.norm)
            for prefix, steps in outcomes.items()
            for step, outcome in enumerate(steps)
            if not outcome.skipped
        ]
        for training in passes:
            training.learner.sync_weights()
            if self._config.train.reset_optimizer_states:
                training.learner.reset_optimizer()
            steps = outcomes[training.prefix]
            if taken := [outcome.norm for outcome in steps if not outcome.skipped]:
                metrics[f"train/{training.prefix}grad_norm"] = sum(taken) / len(taken)
            metrics[f"train/{training.prefix}skipped_steps"] = float(len(steps) - len(taken))
            metrics[f"train/{training.prefix}lr"] = training.learner.learning_rate
        return metrics
