"""Advantages, the policy loss, and corrections for the gap between engine and trainer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from miles.config.schema.section import (
    Derived,
    Negated,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    derived,
)

Level = Literal["token", "sequence", "geometric"]


class AlgorithmConfig(Section):
    """What is computed from a batch of scored samples; docs/algorithms.md has the formulas."""

    advantage_estimator: Literal[
        "grpo", "gspo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo", "rloo", "dr_grpo", "cispo"
    ] = "grpo"
    """How rewards become advantages; ppo trains a critic beside the policy."""

    rewards_normalization: Annotated[bool, Negated("--disable-rewards-normalization")] = True
    """Subtract the mean reward of a prompt's samples."""

    grpo_std_normalization: Annotated[bool, Negated("--disable-grpo-std-normalization")] = True
    """Divide by the standard deviation of a prompt's rewards (grpo, gspo)."""

    normalize_advantages: bool = False
    """Whiten advantages over the whole batch."""

    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Discount from one token to the next."""

    lambd: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Lambda of generalised advantage estimation (ppo)."""

    value_clip: PositiveFloat = 0.2
    """How far a value may move from the one before the rollout's first step before its loss is clipped (ppo)."""

    num_critic_only_steps: NonNegative = 0
    """Rollouts at the start that train the critic alone (ppo)."""

    loss_type: Literal["policy_loss"] = "policy_loss"
    """Loss to minimise."""

    calculate_per_token_loss: bool = False
    """Divide the loss by the tokens of the step instead of averaging over samples."""

    eps_clip: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """The probability ratio is clipped below at 1 − eps_clip."""

    eps_clip_high: Annotated[NonNegativeFloat, Derived("eps_clip")] = derived()
    """The probability ratio is clipped above at 1 + eps_clip_high."""

    eps_clip_c: Annotated[float, Field(gt=1)] | None = None
    """Bound of the ratio for negative advantages (dual clip)."""

    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL penalty in the reward; excludes kl_loss_coef."""

    use_kl_loss: bool = False
    """Compute the KL divergence from the reference in the loss."""

    kl_loss_coef: NonNegativeFloat = 0.0
    """Its weight; 0 only reports it."""

    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = "k1"
    """Estimator of the KL divergence."""

    use_unbiased_kl: bool = False
    """Weight the KL loss by the ratio of new to old probability."""

    ref_update_interval: Positive | None = None
    """Rollouts after which the reference becomes the current policy; not given means never."""

    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""

    observe_training_entropy: bool = False
    """Report the entropy even when entropy_coef is 0."""

    use_rollout_logprobs: bool = False
    """Take the engine's log-probabilities as those of the old policy."""

    keep_old_actor: bool = False
    """Keep copies of the versions that max_weight_staleness allows, in host memory, and take a token's log-probability
    under the version that generated it as that of the old policy."""

    get_mismatch_metrics: bool = False
    """Report how far the engine's log-probabilities are from the trainer's, without changing the loss."""

    use_tis: bool = False
    """Weight the loss by truncated importance sampling from engine to trainer."""

    tis_clip: PositiveFloat = 2.0
    """Upper bound of that weight."""

    tis_clip_low: NonNegativeFloat = 0.0
    """Lower bound of that weight."""

    use_icepop: bool = False
    """Like use_tis, but weights outside the bounds become 0."""

    use_mis: bool = False
    """Importance sampling by level, with rejection; use_tis turns its weights on and use_rs its rejection."""

    tis_level: Level = "token"
    """use_mis: what a weight is of: a token, a sequence (product), or a sequence's mean token (geometric)."""

    tis_mode: Literal["truncate", "clip", "mask"] = "truncate"
    """use_mis: bound weights above (truncate), on both sides (clip), or set those outside to 0 (mask)."""

    tis_lower_bound: Annotated[PositiveFloat, Derived("1 / tis_upper_bound")] = derived()
    """use_mis: lower bound of a weight."""

    tis_upper_bound: PositiveFloat = 2.0
    """use_mis: upper bound of a weight."""

    tis_batch_normalize: bool = True
    """use_mis: scale the weights of a step to a mean of 1."""

    use_rs: bool = False
    """use_mis: leave tokens or sequences outside the bounds out of the loss."""

    rs_level: Level = "token"
    """use_mis: what is rejected; as tis_level."""

    rs_lower_bound: Annotated[PositiveFloat, Derived("tis_lower_bound")] = derived()
    """use_mis: ratios below are rejected."""

    rs_upper_bound: Annotated[PositiveFloat, Derived("tis_upper_bound")] = derived()
    """use_mis: ratios above are rejected."""

    rs_veto_threshold: NonNegativeFloat = 1e-4
    """use_mis: one token ratio below this rejects the whole sequence; 0 never does."""

    use_opd: bool = False
    """On-policy distillation: subtract the KL divergence to a teacher from the advantages of its own tokens."""

    opd_type: Literal["sglang", "megatron"] | None = None
    """Where the teacher is: megatron loads it in the trainer, whatever its backend; sglang is not there yet."""

    opd_kl_coef: NonNegativeFloat = 1.0
    """Weight of that divergence."""

    use_routing_replay: bool = False
    """Train mixture-of-experts models with the experts that the trainer's log-probability pass chose."""

    use_opsm: bool = False
    """Leave out sequences with a negative advantage that the policy has moved away from."""

    opsm_delta: NonNegativeFloat = 1e-4
    """How far: the mean of old minus new log-probability above which use_opsm acts."""
