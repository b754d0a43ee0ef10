"""Advantages and returns of every token from rewards, for the whole batch before its optimizer steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch

from miles.algorithms import token_baseline  # noqa: F401  (it registers its estimator)
from miles.algorithms.estimators import ESTIMATORS, AdvantageBatch, AdvantageConfig
from miles.algorithms.kl import approximate_kl
from miles.algorithms.packing import LOWEST_LOG_PROB, as_float
from miles.algorithms.rewards import keep_rewards, shape_groups, shape_several, standardize, subtract_mean
from miles.algorithms.whitening import masked_whiten

if TYPE_CHECKING:
    import torch.distributed as dist


@dataclasses.dataclass(frozen=True)
class Advantages:
    """Advantages, returns and KL terms of a batch; float32 [T] each."""

    advantages_T: torch.Tensor
    returns_T: torch.Tensor
    """Targets of the value loss; the estimator's returns, never whitened."""
    kl_T: torch.Tensor
    """KL to the reference in the reward; 0 unless kl_coef is set, and at masked tokens without a finite one."""
    opd_reverse_kl_T: torch.Tensor | None
    """log p_student - log p_teacher, or its mean over a set of tokens; None without on-policy distillation."""


def shape_rewards(
    config: AdvantageConfig,
    rewards_B: torch.Tensor | Sequence[float],
    group_ids_B: torch.Tensor | Sequence[Hashable],
) -> torch.Tensor:
    """Normalise rewards within each prompt group as the estimator requires; see `shape_groups`.

    Estimators with several rewards take a tensor [B, K]; see `shape_several`. Needs every sample of each group, so it
    runs where all rewards are known, before samples go to their ranks.
    """
    estimator = ESTIMATORS[config.advantage_estimator]
    shaping = estimator.shaping
    if not config.rewards_normalization:
        shaping = keep_rewards
    elif shaping is standardize and not config.grpo_std_normalization:
        shaping = subtract_mean
    if estimator.several_rewards:
        return shape_several(torch.as_tensor(rewards_B), config.reward_weights, group_ids_B, shaping)
    return shape_groups(rewards_B, group_ids_B, shaping)


def compute_advantages(
    config: AdvantageConfig, batch: AdvantageBatch, group: dist.ProcessGroup | None = None
) -> Advantages:
    """Estimate, subtract the teacher's KL, whiten: in this order, without gradient.

    Args:
        config: which estimator and how.
        batch: this rank's samples.
        group: data-parallel group to whiten over; every rank must call, also one without samples.

    Raises:
        KeyError: unknown estimator.
        ValueError: something the config needs is missing from the batch, or a shape does not fit the packing.
    """
    estimator = ESTIMATORS[config.advantage_estimator]
    _check(config, batch)
    batch = dataclasses.replace(batch, process_group=group)
    with torch.no_grad():
        kl_T = _reward_kl(config, batch)
        advantages_T, returns_T = estimator.function(config, batch, kl_T)
        opd_reverse_kl_T = None
        if config.use_opd:
            opd_reverse_kl_T = batch.opd_reverse_kl_T
            if opd_reverse_kl_T is None:
                opd_reverse_kl_T = reverse_kl_to_teacher(
                    _required(batch.old_log_probs_T, "old_log_probs_T", "use_opd"),
                    _required(batch.teacher_log_probs_T, "teacher_log_probs_T", "use_opd"),
                )
            advantages_T = advantages_T - config.opd_kl_coef * opd_reverse_kl_T
        if estimator.whiten or config.normalize_advantages:
            advantages_T = masked_whiten(advantages_T, batch.mask_T, group)
    return Advantages(advantages_T, returns_T, kl_T, opd_reverse_kl_T)


def reverse_kl_to_teacher(student_log_probs_T: torch.Tensor, teacher_log_probs_T: torch.Tensor) -> torch.Tensor:
    """Single-sample estimate of KL(student || teacher) on the student's own tokens: log p_student - log p_teacher."""
    return _possible(student_log_probs_T) - _possible(teacher_log_probs_T)


def _reward_kl(config: AdvantageConfig, batch: AdvantageBatch) -> torch.Tensor:
    if config.kl_coef == 0:
        return torch.zeros(batch.packing.num_tokens, device=batch.mask_T.device)
    old_T = _required(batch.old_log_probs_T, "old_log_probs_T", "kl_coef")
    ref_T = _required(batch.ref_log_probs_T, "ref_log_probs_T", "kl_coef")
    kl_T = approximate_kl(_possible(old_T), _possible(ref_T), config.kl_loss_type)
    return torch.where(batch.mask_T.bool() | kl_T.isfinite(), kl_T, 0.0)


def _possible(log_probs_T: torch.Tensor) -> torch.Tensor:
    return as_float(log_probs_T).clamp_min(LOWEST_LOG_PROB)


def _required(x_T: torch.Tensor | None, name: str, flag: str) -> torch.Tensor:
    if x_T is None:
        raise ValueError(f"{flag} needs AdvantageBatch.{name}")
    return x_T


def _check(config: AdvantageConfig, batch: AdvantageBatch) -> None:
    batch.packing.check(
        mask_T=batch.mask_T,
        old_log_probs_T=batch.old_log_probs_T,
        ref_log_probs_T=batch.ref_log_probs_T,
        teacher_log_probs_T=batch.teacher_log_probs_T,
        opd_reverse_kl_T=batch.opd_reverse_kl_T,
        values_T=batch.values_T,
        squared_probs_T=batch.squared_probs_T,
    )
    if tuple(batch.rewards_B.shape) != (batch.packing.num_samples,):
        raise ValueError(
            f"rewards_B has shape {tuple(batch.rewards_B.shape)}, but the packing holds "
            f"{batch.packing.num_samples} samples"
        )
