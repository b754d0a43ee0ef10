"""Advantages, policy loss, and corrections of the mismatch between engine and trainer."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from miles.config.schema.section import (
    Derived,
    Metavar,
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
    """Advantages and losses of a batch of scored samples; docs/algorithms.md has the formulas."""

    advantage_estimator: Literal[
        "grpo",
        "gspo",
        "reinforce_plus_plus",
        "reinforce_plus_plus_baseline",
        "ppo",
        "rloo",
        "dr_grpo",
        "cispo",
        "maxrl",
        "gdpo",
        "optimal_token_baseline",
    ] = "grpo"
    """Advantage estimator; ppo also trains a critic."""

    gdpo_rewards: Annotated[tuple[str, ...], Metavar("NAME=WEIGHT ...")] = ()
    """Names of the numbers of a reward that gdpo normalises one by one, with their weights; NAME alone has weight 1."""

    rewards_normalization: Annotated[bool, Negated("--disable-rewards-normalization")] = True
    """Subtract the mean reward of the prompt's group."""

    grpo_std_normalization: Annotated[bool, Negated("--disable-grpo-std-normalization")] = True
    """Divide rewards by the standard deviation of the prompt's group (grpo, gspo, cispo, gdpo)."""

    normalize_advantages: bool = False
    """Whiten advantages over the whole batch (not with dr_grpo and gdpo); reinforce_plus_plus and
    reinforce_plus_plus_baseline always do."""

    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Discount factor per token."""

    lambd: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Lambda of generalised advantage estimation (ppo)."""

    value_clip: PositiveFloat = 0.2
    """Clip range of the value loss, around the values before the rollout's first optimizer step (ppo)."""

    num_critic_only_steps: NonNegative = 0
    """Number of first rollouts that train only the critic (ppo)."""

    loss_type: Literal["policy_loss"] = "policy_loss"
    """Loss to minimise."""

    calculate_per_token_loss: bool = False
    """Average the loss over the tokens of the step instead of over samples (not with dr_grpo and luspo)."""

    eps_clip: Annotated[NonNegativeFloat, Derived("policy_loss_type; 0.2 for ppo_clip, gspo, cispo, dr_grpo")] = (
        derived()
    )
    """Clip the probability ratio below at 1 − eps_clip; 1 or more sets no lower bound (cispo). With gmpo the bound
    of log ratios below, with dppo_tv and dppo_kl that of divergences."""

    eps_clip_high: Annotated[NonNegativeFloat, Derived("eps_clip")] = derived()
    """Clip the probability ratio above at 1 + eps_clip_high; log ratios and divergences likewise."""

    eps_clip_c: Annotated[float, Field(gt=1)] | None = None
    """Upper bound of the ratio for negative advantages (dual clip; ppo_clip, gspo, dr_grpo and luspo); not given
    turns it off."""

    kl_coef: NonNegativeFloat = 0.0
    """Coefficient of the KL penalty in the reward; cannot be combined with kl_loss_coef."""

    use_kl_loss: bool = False
    """Compute the KL loss, the KL divergence from the reference model."""

    kl_loss_coef: NonNegativeFloat = 0.0
    """Coefficient of the KL loss; 0 only reports it."""

    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = "k1"
    """Estimator of the KL divergence."""

    use_unbiased_kl: bool = False
    """Multiply the KL loss by the importance ratio of the new to the old policy."""

    ref_update_interval: Positive | None = None
    """Number of rollouts between updates of the reference model to the current policy; not given means never."""

    entropy_coef: float = 0.0
    """Coefficient of the entropy bonus."""

    observe_training_entropy: bool = False
    """Report the entropy also when entropy_coef is 0."""

    use_rollout_logprobs: bool = False
    """Use the engine's log-probabilities as those of the old policy."""

    keep_old_actor: bool = False
    """Keep copies of the weight versions that max_weight_staleness allows in host memory, and compute the old policy's
    log-probability of each token with the version that generated it."""

    get_mismatch_metrics: bool = False
    """Report metrics of the mismatch between the engine's and the trainer's log-probabilities; the loss stays the
    same."""

    use_tis: bool = False
    """Correct the mismatch between engine and trainer by truncated importance sampling (TIS)."""

    tis_clip: PositiveFloat = 2.0
    """Upper bound of the importance weight (use_tis, use_icepop); 5e8 or more sets none."""

    tis_threshold: PositiveFloat | None = None
    """Same as tis_clip, as some recipes call it."""

    tis_clip_low: NonNegativeFloat = 0.0
    """Lower bound of the importance weight (use_tis, use_icepop)."""

    use_icepop: bool = False
    """Correct as use_tis does, but set weights outside the bounds to 0 (IcePop)."""

    use_mis: bool = False
    """Correct by masked importance sampling (MIS); use_tis enables its weights and use_rs its rejection."""

    tis_level: Level = "token"
    """use_mis: level of a weight: each token, the sequence (product), or the sequence's geometric mean."""

    tis_mode: Literal["truncate", "clip", "mask"] = "truncate"
    """use_mis: bound weights above (truncate) or on both sides (clip), or reject tokens outside the bounds (mask)."""

    tis_lower_bound: Annotated[NonNegativeFloat, Derived("1 / tis_upper_bound")] = derived()
    """use_mis: lower bound of a weight (tis_mode clip and mask); 0 sets none."""

    tis_upper_bound: PositiveFloat = 2.0
    """use_mis: upper bound of a weight."""

    tis_batch_normalize: bool = True
    """use_mis: normalise the weights of a step to a mean of 1."""

    use_rs: bool = False
    """use_mis: reject tokens or sequences whose ratio is outside the bounds."""

    rs_level: Level = "token"
    """use_mis: level of rejection; same values as tis_level."""

    rs_lower_bound: Annotated[NonNegativeFloat, Derived("tis_lower_bound")] = derived()
    """use_mis: reject ratios below this bound; 0 rejects none."""

    rs_upper_bound: Annotated[PositiveFloat, Derived("tis_upper_bound")] = derived()
    """use_mis: reject ratios above this bound."""

    rs_veto_threshold: NonNegativeFloat = 1e-4
    """use_mis: reject the whole sequence when the ratio of one token is below this; 0 turns it off."""

    use_opd: bool = False
    """On-policy distillation: subtract the reverse KL divergence to a teacher from the advantages."""

    opd_type: Literal["sglang", "megatron"] | None = None
    """Where the teacher runs: megatron loads it in the trainer, with either backend; sglang is not implemented."""

    opd_kl_coef: NonNegativeFloat = 1.0
    """Coefficient of the KL divergence to the teacher (use_opd)."""

    use_routing_replay: bool = False
    """Train mixture-of-experts models with the routing of the trainer's log-probability pass."""

    use_opsm: bool = False
    """Mask off-policy sequences (OPSM): those with a negative advantage that the policy has moved away from."""

    opsm_delta: NonNegativeFloat = 1e-4
    """Mean of old minus new log-probability above which use_opsm masks a sequence."""

    @property
    def gdpo_weights(self) -> dict[str, float]:
        """The weight of each reward of gdpo, by name."""
        return dict(parse_weighted(spec) for spec in self.gdpo_rewards)


def parse_weighted(spec: str) -> tuple[str, float]:
    """Split NAME=WEIGHT, or NAME, whose weight is 1. Raises ValueError that says what is wrong."""
    name, equals, text = spec.partition("=")
    if not name:
        raise ValueError("it has no name before =")
    try:
        weight = float(text) if equals else 1.0
    except ValueError:
        raise ValueError("its weight is not a number") from None
    if not math.isfinite(weight) or weight == 0:
        raise ValueError("its weight must be a finite number, and not 0")
    return name, weight
