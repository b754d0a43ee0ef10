"""The job's flags as options of the algorithms."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from miles.algorithms.corrections import CorrectionMethod, IcePop, TruncatedImportanceSampling
from miles.algorithms.estimators import ESTIMATORS, AdvantageConfig, reward_on_every_token
from miles.algorithms.losses import LossConfig
from miles.algorithms.mis import MaskedImportanceSampling
from miles.policy_loss_spec import POLICY_LOSS_SPECS

if TYPE_CHECKING:
    from miles.config import JobConfig
    from miles.config.sections.optimizer import OptimizerConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def advantage_config(config: JobConfig) -> AdvantageConfig:
    """Options of the advantage estimator."""
    weights = tuple(config.algorithm.gdpo_weights.values())
    return AdvantageConfig(reward_weights=weights, **_shared_fields(AdvantageConfig, config))


def loss_config(config: JobConfig) -> LossConfig:
    """Options of the loss."""
    return LossConfig(
        policy_loss=config.policy_loss.policy_loss_type,
        loss_length=config.rollout.rollout_max_response_len or config.rollout.rollout_max_context_len,
        correction=correction_method(config),
        **_shared_fields(LossConfig, config),
    )


def correction_method(config: JobConfig) -> CorrectionMethod | None:
    """The correction of the gap between engine and trainer; None when none is asked for."""
    algorithm = config.algorithm
    if algorithm.use_mis:
        return MaskedImportanceSampling(**_shared_fields(MaskedImportanceSampling, config))
    if algorithm.use_icepop:
        return IcePop(tis_clip=algorithm.tis_clip, tis_clip_low=algorithm.tis_clip_low)
    if algorithm.use_tis:
        return TruncatedImportanceSampling(tis_clip=algorithm.tis_clip, tis_clip_low=algorithm.tis_clip_low)
    return None


def policy_iterations(config: JobConfig) -> int:
    """Optimizer steps of the policy in the whole run; 0 where the number of rollouts is not known."""
    warm_up = config.algorithm.num_critic_only_steps * config.train.num_steps_per_rollout
    return max(0, critic_iterations(config) - warm_up)


def critic_iterations(config: JobConfig) -> int:
    """Optimizer steps of the critic in the whole run; 0 likewise."""
    return (config.data.num_rollout or 0) * config.train.num_steps_per_rollout


def critic_optimizer(config: JobConfig) -> OptimizerConfig:
    """The policy's optimizer with the critic's learning rate and warm-up."""
    optimizer = config.optimizer
    return optimizer.model_copy(
        update={
            "lr": optimizer.lr if optimizer.critic_lr is None else optimizer.critic_lr,
            "lr_warmup_iters": optimizer.critic_lr_warmup_iters,
            "lr_warmup_fraction": None,
        }
    )


def needs_critic(config: JobConfig) -> bool:
    """Whether the advantage estimator reads a critic's values."""
    return ESTIMATORS[config.algorithm.advantage_estimator].needs_values


def needs_squared_probs(config: JobConfig) -> bool:
    """Whether the advantage estimator reads sums of squared probabilities."""
    return ESTIMATORS[config.algorithm.advantage_estimator].needs_squared_probs


def trains_critic_only(config: JobConfig, number: int) -> bool:
    """Whether rollout `number` trains the critic alone."""
    return number < config.algorithm.num_critic_only_steps


def needs_reference(config: JobConfig) -> bool:
    """Whether a KL term needs the reference model."""
    return config.algorithm.use_kl_loss or config.algorithm.kl_coef > 0


def teacher_folder(config: JobConfig) -> str | None:
    """Where the teacher of on-policy distillation is; None without one."""
    return config.checkpoint.opd_teacher_load if config.algorithm.use_opd else None


def needs_log_prob_pass(config: JobConfig) -> bool:
    """Whether the old policy's log-probabilities must be known before the first backward pass.

    With one optimizer step per rollout the training pass itself gives them, so that no separate pass is needed unless
    advantages or corrections of the whole batch are computed from them.
    """
    algorithm = config.algorithm
    in_advantages = (algorithm.kl_coef > 0 or algorithm.use_opd) and not algorithm.use_rollout_logprobs
    in_advantages |= needs_squared_probs(config)
    return config.train.num_steps_per_rollout > 1 or in_advantages or algorithm.use_mis or algorithm.keep_old_actor


def zero_reward_is_zero_gradient(config: JobConfig) -> bool:
    """Whether a sample whose shaped reward is 0 adds nothing to the gradient.

    That is so where advantages are the shaped rewards, and neither the policy loss nor another term has a gradient
    without them.
    """
    algorithm = config.algorithm
    estimator = ESTIMATORS[algorithm.advantage_estimator]
    return (
        estimator.function is reward_on_every_token
        and not POLICY_LOSS_SPECS[config.policy_loss.policy_loss_type].penalises
        and not estimator.whiten
        and not algorithm.normalize_advantages
        and not algorithm.use_opd
        and algorithm.kl_coef == algorithm.entropy_coef == 0
        and not (algorithm.use_kl_loss and algorithm.kl_loss_coef)
        and config.policy_loss.echo_loss_coef == 0
        and not config.megatron.enable_mtp_training
        and config.moe.moe_aux_loss_coeff == config.moe.moe_z_loss_coeff == config.moe.moe_router_bias_update_rate == 0
    )


def _shared_fields(options: type, config: JobConfig) -> dict[str, Any]:
    """Values of the flags that have the names of the options' fields."""
    names = {field.name for field in dataclasses.fields(options)}
    values = config.algorithm.model_dump() | config.policy_loss.model_dump()
    return {name: value for name, value in values.items() if name in names}
