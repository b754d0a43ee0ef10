"""DPPO (2602.04879): a mask by the divergence of the policies takes the place of ratio clipping.

L = -M r A (equation 11). M is 0 where the update would lead away from the old policy, and the divergence has reached
its threshold: for a positive advantage where the token has become more probable, for a negative one where less.
The divergence is that of the two-point distribution "this token or another one" (the binary form), so the two
probabilities of the sampled token suffice. `eps_clip` is the threshold for tokens that lose probability, and
`eps_clip_high` for those that gain.
"""

from __future__ import annotations

import math

import torch

from miles.algorithms.packing import as_float
from miles.algorithms.policy_losses import (
    PolicyInputs,
    PolicyLossConfig,
    PolicyTerms,
    bounded_exp,
    register_policy_loss,
)

_LOWEST_REST = math.log(1e-8)
"""Least log-probability of all other tokens together."""


@register_policy_loss("dppo_tv", trust_region=True)
def dppo_tv(config: PolicyLossConfig, inputs: PolicyInputs) -> PolicyTerms:
    """Mask by the total variation |p - q|, p and q the token's probability now and in the old policy."""
    divergence_T = (inputs.log_probs_T.detach().exp() - inputs.old_log_probs_T.exp()).abs()
    return masked_surrogate(config, inputs, divergence_T)


@register_policy_loss("dppo_kl", trust_region=True)
def dppo_kl(config: PolicyLossConfig, inputs: PolicyInputs) -> PolicyTerms:
    """Mask by KL(q || p) = q log(q / p) + (1 - q) log((1 - q) / (1 - p))."""
    return masked_surrogate(config, inputs, binary_kl(inputs.old_log_probs_T, inputs.log_probs_T.detach()))


def masked_surrogate(config: PolicyLossConfig, inputs: PolicyInputs, divergence_T: torch.Tensor) -> PolicyTerms:
    """-M r A with the mask of these divergences; a masked token has neither loss nor gradient."""
    log_ratio_T = inputs.log_probs_T - inputs.old_log_probs_T
    moved_T = log_ratio_T.detach()
    low, high = config.eps_clip, config.eps_clip if config.eps_clip_high is None else config.eps_clip_high
    gains_T, loses_T = (inputs.advantages_T > 0) & (moved_T > 0), (inputs.advantages_T < 0) & (moved_T < 0)
    masked_T = (gains_T & (divergence_T > high)) | (loses_T & (divergence_T > low))
    loss_T = torch.where(masked_T, 0.0, -bounded_exp(log_ratio_T) * inputs.advantages_T)
    return PolicyTerms(loss_T, as_float(masked_T), log_ratio_T, {"dppo_divergence": divergence_T})


def binary_kl(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """KL of Bernoulli(q) from Bernoulli(p), in nats, from log-probabilities of the same shape and dtype."""
    rest_q, rest_p = (torch.log(-torch.expm1(x)).clamp_min(_LOWEST_REST) for x in (log_q, log_p))
    q = log_q.exp()
    return q * (log_q - log_p) + (1 - q) * (rest_q - rest_p)
