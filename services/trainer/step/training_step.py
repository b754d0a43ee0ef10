"""One rollout's training, whatever holds the model: advantages first, then the optimizer steps.

Dims: N samples of the rollout, B of this rank, T their response tokens.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic

import torch

from miles.algorithms.advantages import compute_advantages, shape_rewards
from miles.algorithms.corrections import Correction, compute_correction
from miles.algorithms.estimators import AdvantageBatch
from miles.algorithms.losses import LossBatch, LossOutput, critic_loss, rl_loss
from miles.algorithms.metrics import MetricSum
from miles.algorithms.vocab_rows import TokenLogProbs
from miles.services.trainer.batch.packing import MicroBatch
from miles.services.trainer.batch.rollout_batch import (
    OptimizerStepPlan,
    RolloutBatch,
    build_batch,
    in_order,
    trained_reward,
)
from miles.services.trainer.checkpoint.random_state import random_state, set_random_state
from miles.services.trainer.ranks.abandoning import Abandonment, StepAbandonedError
from miles.services.trainer.step import algorithm_options
from miles.services.trainer.step.progress import Progress, Report
from miles.services.trainer.step.roles import Learner, OutputT, Role, Roles
from miles.types import Sample, SampleGroup, SampleStatus

if TYPE_CHECKING:
    import torch.distributed as dist

    from miles.config import JobConfig

Record = Callable[..., None]
"""Takes the batch and, by keyword, what `recorded` takes of its tokens."""


@dataclasses.dataclass(frozen=True, slots=True)
class DataRanks:
    """Among how many replicas of the model the samples are dealt out."""

    rank: int
    count: int
    group: dist.ProcessGroup | None
    """One rank of each replica; None when there is one replica."""


@dataclasses.dataclass(frozen=True, slots=True)
class TokenTensors:
    """What is known of this rank's response tokens before the first optimizer step; float32 [T] on the device."""

    mask: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    values: torch.Tensor | None
    """The critic's; None when there is none."""
    train: torch.Tensor | None
    """Log-probabilities of the old policy: of the policy as it is, or of the versions that generated the tokens. None
    when the training pass itself gives them."""
    ref: torch.Tensor | None
    opd_reverse_kl: torch.Tensor | None
    """log p_student - log p_teacher; None without a teacher."""
    rollout: torch.Tensor | None
    correction: Correction | None
    """Only what needs the whole batch."""
    seen: torch.Tensor
    """Log-probabilities before the first optimizer step: `train`, or filled in by the training pass."""
    metrics: dict[str, MetricSum]
    """Of what was computed so far."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Lesson(Generic[OutputT]):
    """One learner's part in a rollout's training."""

    prefix: str
    """Of its metrics' names."""
    learner: Learner[OutputT]
    loss: Callable[[RolloutBatch, OptimizerStepPlan, TokenTensors, MicroBatch, OutputT], LossOutput]


class RolloutTrainer(abc.ABC):
    """Trains the roles that learn on one rollout after the other; every rank makes the same calls."""

    reports_together = False
    """Whether every rank reports at the same points, each between two micro-batches: a step can be left there."""

    def __init__(self, config: JobConfig, roles: Roles, data_ranks: DataRanks, device: torch.device) -> None:
        self.roles = roles
        self._config = config
        self._data_ranks = data_ranks
        self._device = device
        self._loss_config = algorithm_options.loss_config(config)

    @abc.abstractmethod
    def reduce(self, parts: Sequence[dict[str, MetricSum]]) -> dict[str, float]:
        """Means of the metrics, the same on every rank."""

    def begin(self, batch: RolloutBatch) -> None:  # noqa: B027  (most have nothing to do)
        """Called once before anything is computed on a rollout."""

    def train(
        self,
        number: int,
        groups: Sequence[SampleGroup],
        report: Report,
        record: Record | None = None,
        abandonment: Abandonment | None = None,
    ) -> dict[str, float]:
        """Take the optimizer steps of one rollout; returns metrics by name, the same on every rank.

        `number` counts rollouts from 0 and so is the policy's version. `record` is given what there is to record of
        this rank's samples, when all is done. Raises StepAbandonedError, with everything as it was, when `abandonment`
        is requested before the first optimizer step.
        """
        abandonment = abandonment or Abandonment()
        lessons = self._lessons(number)
        before = random_state()
        try:
            return self._train(number, groups, lessons, self._watched(report, abandonment), record, abandonment)
        except StepAbandonedError:
            for lesson in lessons:
                lesson.learner.discard()
            set_random_state(before)
            raise

    def _watched(self, report: Report, abandonment: Abandonment) -> Report:
        """`report`, with a look at whether to leave the step where every rank has one."""
        if not self.reports_together:
            return report

        def watched(progress: Progress) -> None:
            abandonment.check()
            report(progress)

        return watched

    def _train(
        self,
        number: int,
        groups: Sequence[SampleGroup],
        lessons: Sequence[_Lesson[Any]],
        report: Report,
        record: Record | None,
        abandonment: Abandonment,
    ) -> dict[str, float]:
        began = time.monotonic()
        samples = in_order(groups)
        rewards_N = self._shaped_rewards(samples)
        idle = (
            rewards_N.eq(0).nonzero().flatten().tolist()
            if algorithm_options.zero_reward_is_zero_gradient(self._config)
            else ()
        )
        batch = build_batch(samples, self._config, self._data_ranks.rank, self._data_ranks.count, frozenset(idle))
        self.begin(batch)
        tokens = self._prepare(number, batch, rewards_N, report, abandonment)
        prepared = time.monotonic()
        metrics = self._take_steps(number, batch, tokens, lessons, report, abandonment)
        if record is not None:
            record(
                batch,
                mask_T=tokens.mask,
                advantages_T=tokens.advantages,
                train_log_probs_T=tokens.seen,
                rollout_log_probs_T=tokens.rollout,
            )
        interval = self._config.algorithm.ref_update_interval
        if self.roles.reference is not None and interval is not None and (number + 1) % interval == 0:
            self.roles.reference.follow()
        return metrics | {"perf/log_probs_time": prepared - began}

    def _lessons(self, number: int) -> list[_Lesson[Any]]:
        """Who learns in this rollout, and from which loss."""
        lessons: list[_Lesson[Any]] = []
        if not self._warms_up(number):
            lessons.append(_Lesson("", self.roles.policy, self._policy_loss))
        if self.roles.critic is not None:
            lessons.append(_Lesson("critic_", self.roles.critic, self._critic_loss))
        return lessons

    def _warms_up(self, number: int) -> bool:
        """Whether this rollout trains the critic alone."""
        return number < self._config.algorithm.num_critic_only_steps

    def _take_steps(
        self,
        number: int,
        batch: RolloutBatch,
        tokens: TokenTensors,
        lessons: Sequence[_Lesson[Any]],
        report: Report,
        abandonment: Abandonment,
    ) -> dict[str, float]:
        """Metrics of all optimizer steps, the same on every rank."""
        parts = [tokens.metrics]
        norms: dict[str, list[float]] = {lesson.prefix: [] for lesson in lessons}
        count = len(batch.micro_batches) * len(lessons)
        done = 0
        for step in batch.steps:
            for lesson in lessons:
                before = done

                def report_done(number: int, before: int = before) -> None:
                    report(Progress("forward_backward", min(before + number, count), count))

                loss = functools.partial(lesson.loss, batch, step, tokens)
                parts += lesson.learner.accumulate(batch, step, loss, report_done)
                done += len(step.all_micro_batches)
                report(Progress("optimizer", done, count))
                if not any(norms.values()):
                    abandonment.commit()
                    if self.roles.old_actors is not None:
                        self.roles.old_actors.keep(number)
                norms[lesson.prefix].append(lesson.learner.step())
        metrics = self.reduce(parts)
        for lesson in lessons:
            lesson.learner.settle()
            metrics[f"train/{lesson.prefix}grad_norm"] = sum(norms[lesson.prefix]) / len(norms[lesson.prefix])
            metrics[f"train/{lesson.prefix}lr"] = lesson.learner.learning_rate
        return metrics

    def _policy_loss(
        self,
        batch: RolloutBatch,
        step: OptimizerStepPlan,
        tokens: TokenTensors,
        micro_batch: MicroBatch,
        outputs: TokenLogProbs,
    ) -> LossOutput:
        """The micro-batch's share of the step's loss; sums over micro-batches and replicas give the whole."""
        where = batch.place(micro_batch).to(self._device)
        if tokens.train is None:
            tokens.seen[where] = outputs.log_probs_T.detach()
        members = [batch.position(i) for i in micro_batch.samples]
        per_token = self._config.algorithm.calculate_per_token_loss
        return rl_loss(
            self._loss_config,
            LossBatch(
                packing=batch.packing.subset(members),
                mask_T=tokens.mask[where],
                advantages_T=tokens.advantages[where],
                train_log_probs_T=None if tokens.train is None else tokens.train[where],
                rollout_log_probs_T=None if tokens.rollout is None else tokens.rollout[where],
                ref_log_probs_T=None if tokens.ref is None else tokens.ref[where],
                opd_reverse_kl_T=None if tokens.opd_reverse_kl is None else tokens.opd_reverse_kl[where],
                correction=None if tokens.correction is None else tokens.correction.take(batch.packing, members),
                denominator=step.num_tokens if per_token else step.num_samples,
            ),
            outputs.log_probs_T,
            outputs.entropy_T,
        )

    def _critic_loss(
        self,
        batch: RolloutBatch,
        step: OptimizerStepPlan,
        tokens: TokenTensors,
        micro_batch: MicroBatch,
        values_R: torch.Tensor,
    ) -> LossOutput:
        """As `_policy_loss`, of the critic."""
        assert tokens.values is not None, "a critic learns from the values before its first step"
        where = batch.place(micro_batch).to(self._device)
        algorithm = self._config.algorithm
        return critic_loss(
            LossBatch(
                packing=batch.packing.subset([batch.position(i) for i in micro_batch.samples]),
                mask_T=tokens.mask[where],
                advantages_T=tokens.advantages[where],
                denominator=step.num_tokens if algorithm.calculate_per_token_loss else step.num_samples,
            ),
            values_R,
            tokens.values[where],
            tokens.returns[where],
            value_clip=algorithm.value_clip,
            calculate_per_token_loss=algorithm.calculate_per_token_loss,
        )

    def _prepare(
        self, number: int, batch: RolloutBatch, rewards_N: torch.Tensor, report: Report, abandonment: Abandonment
    ) -> TokenTensors:
        """Everything that is computed on the whole batch before the first optimizer step."""
        config, device, group = self._config, self._device, self._data_ranks.group
        mask = batch.masks().to(device)
        rollout = batch.rollout_log_probs()
        rollout = None if rollout is None else rollout.to(device)
        roles = self.roles

        def evaluate(role: Role | None) -> torch.Tensor | None:
            abandonment.check()
            return None if role is None else role.evaluate(batch, report)

        train, metrics = self._old_log_probs(number, batch, rollout, mask, report)
        ref = evaluate(roles.reference)
        teacher = evaluate(roles.teacher)
        values = evaluate(roles.critic)
        abandonment.check()
        advantages = compute_advantages(
            algorithm_options.advantage_config(config),
            AdvantageBatch(
                packing=batch.packing,
                mask_T=mask,
                rewards_B=rewards_N[list(batch.mine)].to(device),
                old_log_probs_T=train,
                ref_log_probs_T=ref,
                teacher_log_probs_T=teacher,
                values_T=values,
            ),
            group,
        )
        method = algorithm_options.correction_method(config)
        correction = None
        if method is not None and train is not None and rollout is not None:
            correction = compute_correction(
                method,
                train_log_probs_T=train,
                rollout_log_probs_T=rollout,
                mask_T=mask,
                packing=batch.packing,
                group=group,
            )
        seen = torch.zeros_like(mask) if train is None else train
        return TokenTensors(
            mask=mask,
            advantages=advantages.advantages_T,
            returns=advantages.returns_T,
            values=values,
            train=train,
            ref=ref,
            opd_reverse_kl=advantages.opd_reverse_kl_T,
            rollout=rollout,
            correction=correction,
            seen=seen,
            metrics=metrics,
        )

    def _old_log_probs(
        self, number: int, batch: RolloutBatch, rollout_T: torch.Tensor | None, mask_T: torch.Tensor, report: Report
    ) -> tuple[torch.Tensor | None, dict[str, MetricSum]]:
        """Log-probabilities [T] of the old policy, None where the training pass gives them; and metrics."""
        policy, old = self.roles.policy, self.roles.old_actors
        if old is not None:
            numbers = old.log_probs(number, batch, policy, rollout_T, report)
            log_probs_T, kept_T = (each_T.to(self._device) for each_T in numbers)
            ratio = MetricSum((kept_T * mask_T).sum(), float(mask_T.sum()))
            return log_probs_T, {"train/old_actor_ratio": ratio}
        if algorithm_options.needs_log_prob_pass(self._config) or self._warms_up(number):
            return policy.evaluate(batch, report), {}
        return None, {}

    def _shaped_rewards(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Group-normalised rewards of all N samples; float32 [N]. FAILED samples stand outside their group."""
        shaped = torch.zeros(len(samples))
        scored = [i for i, sample in enumerate(samples) if sample.status is not SampleStatus.FAILED]
        shaped[scored] = shape_rewards(
            algorithm_options.advantage_config(self._config),
            [trained_reward(samples[i], self._config.reward.reward_key) for i in scored],
            [samples[i].group_id for i in scored],
        )
        return shaped
