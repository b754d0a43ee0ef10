"""What a rollout's losses need before the first optimizer step: old log-probs, the other roles' outputs, advantages.

Dims: N samples of the rollout, B of this rank, T their response tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from miles.algorithms.advantages import compute_advantages, shape_rewards
from miles.algorithms.corrections import Correction, compute_correction
from miles.algorithms.device_copies import to_device
from miles.algorithms.estimators import AdvantageBatch
from miles.algorithms.metrics import MetricSum
from miles.services.trainer.batch.rollout_batch import SHAPED_REWARD, RolloutBatch, trained_reward
from miles.services.trainer.ranks.abandoning import Abandonment
from miles.services.trainer.step import algorithm_options
from miles.services.trainer.step.data_ranks import DataRanks
from miles.services.trainer.step.progress import Report
from miles.services.trainer.step.reverse_kl import TokenSetDistillation
from miles.services.trainer.step.roles import LogProbRole, Roles
from miles.telemetry.tracing import traced
from miles.types import Sample, SampleStatus

if TYPE_CHECKING:
    from miles.config import JobConfig


@dataclasses.dataclass(frozen=True, slots=True)
class TokenTensors:
    """Per-token inputs of the losses, known before the first optimizer step; float32 [T] on the device."""

    mask: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    values: torch.Tensor | None
    """From the critic; None without one."""
    train: torch.Tensor | None
    """Log-probabilities of the old policy: of the current policy, or of the versions that generated the tokens.
    None when the training pass itself gives them."""
    ref: torch.Tensor | None
    opd_reverse_kl: torch.Tensor | None
    """log p_student - log p_teacher, or its mean over a set of tokens; None without a teacher."""
    rollout: torch.Tensor | None
    correction: Correction | None
    """The part of it that needs the whole batch."""
    seen: torch.Tensor
    """Log-probabilities before the first optimizer step: `train`, or filled in by the training pass."""
    metrics: dict[str, MetricSum]
    """From computing these."""


class Preparation:
    """Computes rewards, log-probabilities, values and advantages on whole rollouts."""

    def __init__(self, config: JobConfig, roles: Roles, data_ranks: DataRanks, device: torch.device) -> None:
        self._config = config
        self._roles = roles
        self._data_ranks = data_ranks
        self._device = device
        self._sets = TokenSetDistillation(config.distillation, device)

    @traced("prepare")
    def prepare(
        self, number: int, batch: RolloutBatch, rewards_N: torch.Tensor, report: Report, abandonment: Abandonment
    ) -> TokenTensors:
        """Compute everything that needs the whole batch, before the first optimizer step.

        Raises StepAbandonedError when `abandonment` is requested meanwhile.
        """
        config, device, group = self._config, self._device, self._data_ranks.group
        mask = to_device(batch.masks(), device)
        rollout = batch.rollout_log_probs()
        rollout = None if rollout is None else to_device(rollout, device)
        roles = self._roles

        def log_probs_of(role: LogProbRole | None) -> torch.Tensor | None:
            abandonment.check()
            return None if role is None else role.compute_log_probs(batch, report)

        train, squares, metrics = self._old_log_probs(number, batch, rollout, mask, report)
        ref = log_probs_of(roles.reference)
        teacher, opd_reverse_kl = None, None
        if algorithm_options.distils_sets(config):
            opd_reverse_kl = self._sets.reverse_kl(batch, roles.policy, roles.teacher, report)
        elif config.distillation.teacher_urls:
            teacher = to_device(batch.teacher_log_probs(), device)
        else:
            teacher = log_probs_of(roles.teacher)
        abandonment.check()
        values = None if roles.critic is None else roles.critic.compute_values(batch, report)
        abandonment.check()
        group_numbers = {name: n for n, name in enumerate(sorted({s.group_id for s in batch.samples}))}
        advantages = compute_advantages(
            algorithm_options.advantage_config(config),
            AdvantageBatch(
                packing=batch.packing,
                mask_T=mask,
                rewards_B=to_device(rewards_N[list(batch.mine)], device),
                old_log_probs_T=self._behind_advantages(train, rollout, mask),
                ref_log_probs_T=ref,
                teacher_log_probs_T=teacher,
                opd_reverse_kl_T=opd_reverse_kl,
                values_T=values,
                squared_probs_T=squares,
                group_ids_B=torch.tensor([group_numbers[batch.samples[i].group_id] for i in batch.mine]),
                num_groups=len(group_numbers),
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

    def shaped_rewards(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Group-normalised rewards of all N samples, or what a function of the user's made of them; float32 [N].

        FAILED samples do not count in their group.
        """
        shaped = torch.zeros(len(samples))
        scored = [i for i, sample in enumerate(samples) if sample.status is not SampleStatus.FAILED]
        if self._config.extensions.custom_reward_post_process_path is not None:
            shaped[scored] = torch.tensor([float(samples[i].metadata[SHAPED_REWARD]) for i in scored])
            return shaped
        if not scored:
            return shaped
        shaped[scored] = shape_rewards(
            algorithm_options.advantage_config(self._config),
            torch.tensor([self._trained(samples[i]) for i in scored], dtype=torch.float64),
            [samples[i].group_id for i in scored],
        )
        return shaped

    def _trained(self, sample: Sample) -> float | list[float]:
        """The number that advantages are made of, or gdpo's several."""
        weights = self._config.algorithm.gdpo_weights
        if weights:
            return [trained_reward(sample, name) for name in weights]
        return trained_reward(sample, self._config.reward.reward_key)

    def _behind_advantages(
        self, train_T: torch.Tensor | None, rollout_T: torch.Tensor | None, mask_T: torch.Tensor
    ) -> torch.Tensor | None:
        """The old policy's log-probabilities [T] that KL terms of advantages are computed from.

        The engine has none of masked tokens that it did not sample: NaN there, where the reward's KL leaves it out.
        """
        if not self._config.algorithm.use_rollout_logprobs:
            return train_T
        return None if rollout_T is None else torch.where(mask_T.bool(), rollout_T, torch.nan)

    def _old_log_probs(
        self, number: int, batch: RolloutBatch, rollout_T: torch.Tensor | None, mask_T: torch.Tensor, report: Report
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, dict[str, MetricSum]]:
        """Log-probabilities [T] of the old policy, None where the training pass gives them; squares; and metrics.

        Squares are sums of squared probabilities [T], None where the estimator does not read them.
        """
        policy, old = self._roles.policy, self._roles.old_policies
        if old is not None:
            log_probs_and_kept = old.log_probs_by_version(number, batch, policy, rollout_T, report)
            log_probs_T, kept_T = (each_T.to(self._device) for each_T in log_probs_and_kept)
            ratio = MetricSum((kept_T * mask_T).sum(), float(mask_T.sum()))
            return log_probs_T, None, {"train/old_actor_ratio": ratio}
        if algorithm_options.needs_squared_probs(self._config):
            log_probs_T, squares_T = policy.compute_log_probs_and_squares(batch, report).unbind(1)
            return log_probs_T.contiguous(), squares_T.contiguous(), {}
        if algorithm_options.needs_log_prob_pass(self._config) or algorithm_options.trains_critic_only(
            self._config, number
        ):
            return policy.compute_log_probs(batch, report), None, {}
        return None, None, {}
