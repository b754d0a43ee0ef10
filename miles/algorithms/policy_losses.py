"""Policy-gradient losses of each token, before masking, weighting and aggregation.

This module has the losses that clip the importance ratio; `divergence_masks`, `sequence_losses` and `soft_losses` have
others. A policy loss is one function registered by name:

    @register_policy_loss("mine")
    def mine(config, inputs):
        log_ratio_T = inputs.log_probs_T - inputs.old_log_probs_T
        return PolicyTerms(-log_ratio_T.exp() * inputs.advantages_T, torch.zeros_like(log_ratio_T), log_ratio_T)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from miles.algorithms.kl import LOG_RATIO_BOUND
from miles.algorithms.packing import Packing, keep_log_probs, keep_where
from miles.algorithms.registry import Registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Clipping of the importance ratio. Field names are the names of the flags."""

    eps_clip: float = 0.2
    """Ratios are clipped below at 1 - eps_clip."""
    eps_clip_high: float | None = None
    """Ratios are clipped above at 1 + eps_clip_high; None means eps_clip."""
    eps_clip_c: float | None = None
    """Dual clip: where the advantage is negative the loss is at most -eps_clip_c * A; None: off."""

    def __post_init__(self) -> None:
        for name in ("eps_clip", "eps_clip_high"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} is {value}; it must be at least 0")
        if self.eps_clip_c is not None and not self.eps_clip_c > 1:
            raise ValueError(f"eps_clip_c is {self.eps_clip_c}; it must be greater than 1, or None for no dual clip")

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest ratio that is not clipped."""
        return 1 - self.eps_clip, 1 + (self.eps_clip if self.eps_clip_high is None else self.eps_clip_high)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyLossConfig(ClipConfig):
    """What policy losses read. The other fields belong to one loss each, and are named like the flags."""

    sapo_tau_pos: float = 1.0
    """sapo: temperature of the gate where the advantage is positive."""
    sapo_tau_neg: float = 1.05
    """sapo: temperature of the gate elsewhere."""
    vespo_k_pos: float = 2.0
    """vespo: exponent of the sequence ratio where the advantage is at least 0."""
    vespo_lambda_pos: float = 3.0
    """vespo: decay in the sequence ratio there."""
    vespo_k_neg: float = 3.0
    """vespo: exponent where the advantage is negative."""
    vespo_lambda_neg: float = 2.0
    """vespo: decay there."""
    dro_beta: float | None = None
    """dro: weight of the squared log ratio; dro needs one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyInputs:
    """Packed tokens; everything is 0 where `mask_T` is not set, and float32 (or float64). See `of`."""

    packing: Packing
    mask_T: torch.Tensor
    log_probs_T: torch.Tensor
    """Of the policy being trained; the only one with a gradient."""
    old_log_probs_T: torch.Tensor
    advantages_T: torch.Tensor

    @classmethod
    def of(
        cls,
        *,
        packing: Packing,
        mask_T: torch.Tensor,
        log_probs_T: torch.Tensor,
        old_log_probs_T: torch.Tensor | None,
        advantages_T: torch.Tensor,
    ) -> PolicyInputs:
        """From tensors of any float dtype; what they hold at masked tokens is ignored.

        Args:
            packing: of the tensors that follow, [T] each.
            mask_T: 1 on tokens that are trained on, 0 elsewhere.
            log_probs_T: of the policy being trained.
            old_log_probs_T: of the policy that the ratio is taken against; None: the one being trained, as it is.
            advantages_T: per token.

        Raises:
            ValueError: a shape does not fit the packing.
        """
        packing.check(
            mask_T=mask_T, log_probs_T=log_probs_T, old_log_probs_T=old_log_probs_T, advantages_T=advantages_T
        )
        new_T = keep_log_probs(mask_T, log_probs_T)
        old_T = new_T if old_log_probs_T is None else keep_log_probs(mask_T, old_log_probs_T)
        return cls(
            packing=packing,
            mask_T=mask_T.bool(),
            log_probs_T=new_T,
            old_log_probs_T=old_T.detach(),
            advantages_T=keep_where(mask_T, advantages_T).detach(),
        )


@dataclasses.dataclass(frozen=True)
class PolicyTerms:
    """What a policy loss returns, [T] each."""

    loss_T: torch.Tensor
    clipped_T: torch.Tensor
    """1 where clipping changed the loss, else 0."""
    log_ratio_T: torch.Tensor
    """The log ratio the loss is made of."""
    metrics_T: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """Further per-token metrics by name, without gradient; reported as train/name."""


PolicyLossFunction = Callable[[PolicyLossConfig, PolicyInputs], PolicyTerms]


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """A registered policy loss."""

    function: PolicyLossFunction
    trust_region: bool
    """Whether tokens or sequences that have left the old policy's neighbourhood lose their gradient, or get one back
    to it. Without, samples should be fresh."""


POLICY_LOSSES: Registry[PolicyLoss] = Registry("policy loss")


def register_policy_loss(
    name: str, *, trust_region: bool = False
) -> Callable[[PolicyLossFunction], PolicyLossFunction]:
    """Register the decorated function under `name`; the parameters are the fields of `PolicyLoss`."""

    def register(function: PolicyLossFunction) -> PolicyLossFunction:
        POLICY_LOSSES.add(name, PolicyLoss(function, trust_region))
        return function

    return register


def policy_loss(name: str, config: PolicyLossConfig, inputs: PolicyInputs) -> PolicyTerms:
    """Evaluate the policy loss registered as `name`.

    Raises KeyError for an unknown name.
    """
    return POLICY_LOSSES[name].function(config, inputs)


def bounded_exp(log_ratio: torch.Tensor) -> torch.Tensor:
    """exp with its argument clamped to +-20; no gradient outside."""
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def clipped_surrogate(config: ClipConfig, log_ratio_T: torch.Tensor, advantages_T: torch.Tensor) -> PolicyTerms:
    """max(-r A, -clip(r) A) (PPO, 1707.06347), with asymmetric bounds (DAPO, 2503.14476) and dual clip (1912.09729)."""
    ratio_T = bounded_exp(log_ratio_T)
    plain_T = -ratio_T * advantages_T
    clipped_T = -ratio_T.clamp(*config.bounds) * advantages_T
    loss_T = torch.maximum(plain_T, clipped_T)
    if config.eps_clip_c is not None:
        capped_T = torch.minimum(-config.eps_clip_c * advantages_T, loss_T)
        loss_T = torch.where(advantages_T < 0, capped_T, loss_T)
    return PolicyTerms(loss_T, (clipped_T > plain_T).to(loss_T.dtype), log_ratio_T)


@register_policy_loss("ppo_clip", trust_region=True)
@register_policy_loss("dr_grpo", trust_region=True)
def ppo_clip(config: PolicyLossConfig, inputs: PolicyInputs) -> PolicyTerms:
    """The clipped surrogate of each token's own ratio. dr_grpo is aggregated with a constant denominator."""
    return clipped_surrogate(config, inputs.log_probs_T - inputs.old_log_probs_T, inputs.advantages_T)


@register_policy_loss("gspo", trust_region=True)
def gspo(config: PolicyLossConfig, inputs: PolicyInputs) -> PolicyTerms:
    """The clipped surrogate of the sequence ratio: every token has the masked mean of its sequence's log ratios."""
    mean_B = inputs.packing.mean(inputs.log_probs_T - inputs.old_log_probs_T, inputs.mask_T)
    log_ratio_T = keep_where(inputs.mask_T, inputs.packing.expand(mean_B))
    return clipped_surrogate(config, log_ratio_T, inputs.advantages_T)


@register_policy_loss("cispo")
def cispo(config: PolicyLossConfig, inputs: PolicyInputs) -> PolicyTerms:
    """-sg(clip(r)) A log p (MiniMax-M1, 2506.13585): the clipped ratio is a weight, so clipped tokens keep a gradient.

    `eps_clip` of 1 or more leaves the ratio unbounded below, as the paper does.
    """
    log_ratio_T = inputs.log_probs_T - inputs.old_log_probs_T
    ratio_T = bounded_exp(log_ratio_T.detach())
    weight_T = ratio_T.clamp(*config.bounds)
    loss_T = -weight_T * inputs.advantages_T * inputs.log_probs_T
    return PolicyTerms(loss_T, (weight_T != ratio_T).to(loss_T.dtype), log_ratio_T)


def opsm_drop(
    *,
    packing: Packing,
    mask_T: torch.Tensor,
    log_probs_T: torch.Tensor,
    old_log_probs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    delta: float,
) -> torch.Tensor:
    """Off-policy sequence masking (DeepSeek-V3.2): which tokens to drop, bool [T].

    A token is dropped where its advantage is negative and the masked mean of old - new log-prob over its sequence is
    greater than `delta`.
    """
    sequence_kl_B = packing.mean(old_log_probs_T.detach() - log_probs_T.detach(), mask_T)
    return (advantages_T < 0) & (packing.expand(sequence_kl_B) > delta)
