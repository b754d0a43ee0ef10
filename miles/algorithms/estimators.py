"""Advantage estimators.

An estimator is a function from an `AdvantageBatch` to per-token advantages and returns. It is registered by name with
its reward shaping within a prompt group, and whether its advantages are always whitened:

    @register_estimator("mine", shaping=standardize)
    def mine(config, batch, kl_T):
        advantages_T = batch.packing.expand(batch.rewards_B)
        return advantages_T, advantages_T
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from miles.algorithms.packing import Packing, as_float
from miles.algorithms.registry import Registry
from miles.algorithms.rewards import (
    RewardShaping,
    divide_by_mean,
    keep_rewards,
    standardize,
    subtract_leave_one_out_mean,
    subtract_mean,
)
from miles.algorithms.scan import discounted_suffix_sums

if TYPE_CHECKING:
    import torch.distributed as dist


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """Options of advantage estimation, named like the flags."""

    advantage_estimator: str = "grpo"
    rewards_normalization: bool = True
    """False: rewards go to the estimator as they are."""
    grpo_std_normalization: bool = True
    """False: estimators that standardise rewards only subtract the mean."""
    reward_weights: tuple[float, ...] = ()
    """gdpo: the weight of each of several rewards."""
    normalize_advantages: bool = False
    """Whiten advantages over the data-parallel group."""
    gamma: float = 1.0
    """Discount per token."""
    lambd: float = 1.0
    """Lambda of generalised advantage estimation."""
    kl_coef: float = 0.0
    """Weight of the KL penalty in the reward; excludes a KL loss."""
    kl_loss_type: str = "k1"
    """Estimator of the KL (`KlType`)."""
    use_opd: bool = False
    """On-policy distillation: subtract the reverse KL to a teacher from the advantages."""
    opd_kl_coef: float = 1.0
    """Weight of that KL."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdvantageBatch:
    """The samples of a rank before the first optimizer step; all log-probs are at the rollout temperature."""

    packing: Packing
    mask_T: torch.Tensor
    """1 on tokens that are trained on, 0 elsewhere; any dtype."""
    rewards_B: torch.Tensor
    """Rewards as `shape_rewards` returns them."""
    old_log_probs_T: torch.Tensor | None = None
    """Of the policy that generated the tokens: the trainer's, or with use_rollout_logprobs the engine's; needed for
    kl_coef and use_opd."""
    ref_log_probs_T: torch.Tensor | None = None
    """Of the reference policy; needed for kl_coef."""
    teacher_log_probs_T: torch.Tensor | None = None
    """Of the teacher; needed for use_opd without opd_reverse_kl_T."""
    opd_reverse_kl_T: torch.Tensor | None = None
    """Divergence from the teacher over a set of tokens, `top_k_reverse_kl`; takes the place of the sampled token's."""
    values_T: torch.Tensor | None = None
    """The critic's values; needed for ppo."""
    squared_probs_T: torch.Tensor | None = None
    """Sum of the squared probabilities of all tokens at each position; needed for optimal_token_baseline."""
    group_ids_B: torch.Tensor | None = None
    """Which prompt each sample belongs to, numbered from 0 on all ranks alike, int64; needed for
    optimal_token_baseline."""
    num_groups: int = 0
    """Prompts on all ranks together."""
    process_group: dist.ProcessGroup | None = None
    """The data-parallel group, for estimators that compare samples of several ranks; set by `compute_advantages`."""


EstimatorFunction = Callable[[AdvantageConfig, AdvantageBatch, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(config, batch, kl_T) to (advantages_T, returns_T); kl_T is 0 everywhere unless kl_coef is set."""


@dataclasses.dataclass(frozen=True)
class Estimator:
    """A registered estimator."""

    function: EstimatorFunction
    shaping: RewardShaping
    whiten: bool
    """Advantages are whitened whether or not normalize_advantages is set."""
    needs_values: bool
    """It reads `AdvantageBatch.values_T`, so a critic has to be trained."""
    several_rewards: bool
    """Samples have several rewards, which are shaped one by one."""
    needs_squared_probs: bool
    """It reads `AdvantageBatch.squared_probs_T`."""


ESTIMATORS: Registry[Estimator] = Registry("advantage estimator")


def register_estimator(
    name: str,
    *,
    shaping: RewardShaping = keep_rewards,
    whiten: bool = False,
    needs_values: bool = False,
    several_rewards: bool = False,
    needs_squared_probs: bool = False,
) -> Callable[[EstimatorFunction], EstimatorFunction]:
    """Register the decorated function under `name`; the parameters are the fields of `Estimator`."""

    def register(function: EstimatorFunction) -> EstimatorFunction:
        ESTIMATORS.add(name, Estimator(function, shaping, whiten, needs_values, several_rewards, needs_squared_probs))
        return function

    return register


@register_estimator("grpo", shaping=standardize)
@register_estimator("gspo", shaping=standardize)
@register_estimator("cispo", shaping=standardize)
@register_estimator("dr_grpo", shaping=subtract_mean)
@register_estimator("rloo", shaping=subtract_leave_one_out_mean)
@register_estimator("maxrl", shaping=divide_by_mean)
@register_estimator("gdpo", shaping=standardize, several_rewards=True)
def reward_on_every_token(
    config: AdvantageConfig, batch: AdvantageBatch, kl_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The shaped reward on every response token.

    GRPO (2402.03300), GSPO (2507.18071), CISPO (2506.13585), Dr. GRPO (2503.20783), RLOO (2402.14740), MaxRL
    (2602.02710) and GDPO (2601.05242) differ in how rewards are shaped and in the policy loss.
    """
    advantages_T = batch.packing.expand(as_float(batch.rewards_B))
    return advantages_T, advantages_T


@register_estimator("reinforce_plus_plus", whiten=True)
def reinforce_plus_plus(
    config: AdvantageConfig, batch: AdvantageBatch, kl_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """G_t = r_t + gamma * G_(t+1), r_t = -kl_coef * KL_t, plus the reward at the last unmasked token (2501.03262).

    The KL of masked tokens counts where it is finite. A sample without an unmasked token drops its reward.
    """
    rewards_T = -config.kl_coef * kl_T + place_at_last_token(batch.rewards_B, batch.mask_T, batch.packing)
    returns_T = discounted_suffix_sums(rewards_T, batch.packing, config.gamma).to(kl_T.dtype)
    return returns_T, returns_T


@register_estimator("reinforce_plus_plus_baseline", shaping=subtract_mean, whiten=True)
def reinforce_plus_plus_baseline(
    config: AdvantageConfig, batch: AdvantageBatch, kl_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A_t = (r - group mean) - kl_coef * KL_t (2501.03262, the variant with a group baseline)."""
    advantages_T = batch.packing.expand(as_float(batch.rewards_B)) - config.kl_coef * kl_T
    return advantages_T, advantages_T


@register_estimator("ppo", needs_values=True)
def ppo(config: AdvantageConfig, batch: AdvantageBatch, kl_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (1506.02438) over the trainable tokens alone.

    Masked tokens are squeezed out: they carry no reward and no value, and no discount passes over them. The reward of
    a sample comes at its last trainable token, after which the value is 0. Masked tokens get advantage and return 0.

    Raises:
        ValueError: the batch has no values.
    """
    if batch.values_T is None:
        raise ValueError("advantage_estimator ppo needs the critic's values: set AdvantageBatch.values_T")
    packing, kept_T = batch.packing, batch.mask_T.bool()
    trainable = Packing(tuple(int(n) for n in packing.sum(kept_T.long()).tolist()))
    values = as_float(batch.values_T)[kept_T]
    rewards_T = -config.kl_coef * kl_T + place_at_last_token(batch.rewards_B, batch.mask_T, packing)
    next_values = _shift_left(values, trainable)
    deltas = rewards_T[kept_T].double() + config.gamma * next_values.double() - values.double()
    advantages = discounted_suffix_sums(deltas, trainable, config.gamma * config.lambd)
    advantages_T = torch.zeros_like(kl_T).masked_scatter(kept_T, advantages.to(kl_T.dtype))
    returns_T = torch.zeros_like(kl_T).masked_scatter(kept_T, (advantages + values.double()).to(kl_T.dtype))
    return advantages_T, returns_T


def place_at_last_token(rewards_B: torch.Tensor, mask_T: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Each sample's reward at its last unmasked token, 0 elsewhere, [T]; dropped where every token is masked."""
    last_T = torch.zeros(packing.num_tokens, dtype=torch.bool, device=mask_T.device)
    for part, mask in zip(packing.split(last_T), packing.split(mask_T), strict=True):
        unmasked = mask.nonzero()
        if len(unmasked):
            part[unmasked[-1]] = True
    return torch.where(last_T, packing.expand(as_float(rewards_B).to(mask_T.device)), 0.0)


def _shift_left(x_T: torch.Tensor, packing: Packing) -> torch.Tensor:
    """The next token's value, 0 after a sample's last token."""
    shifted_T = torch.cat([x_T[1:], x_T.new_zeros(1)])[: len(x_T)]
    ends = [end - 1 for end, n in zip(packing.cu_seqlens()[1:].tolist(), packing.lengths, strict=True) if n]
    shifted_T[ends] = 0
    return shifted_T
