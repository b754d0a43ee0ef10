"""Policy losses that fade out with the distance from the old policy, in place of a bound where they stop."""

from __future__ import annotations

import math

import torch

from miles.algorithms.kl import LOG_RATIO_BOUND
from miles.algorithms.packing import keep_where
from miles.algorithms.policy_losses import (
    PolicyInputs,
    PolicyLossConfig,
    PolicyTerms,
    bounded_exp,
    register_policy_loss,
)

_LOWEST_SEQUENCE_RATIO = math.log(1e-8)


@register_policy_loss("sapo", trust_region=True)
def sapo(config: PolicyLossConfig, inputs: PolicyInputs) -> PolicyTerms:
    """-f(r) A with the gate f(r) = 4 / tau * sigmoid(tau (r - 1)) (SAPO, 2511.20347).

    tau is `sapo_tau_pos` where the advantage is positive and `sapo_tau_neg` elsewhere. The gate's slope, reported as
    sapo_weight, is 1 on policy and falls off on both sides.
    """
    log_ratio_T = inputs.log_probs_T - inputs.old_log_probs_T
    tau_T = _where(inputs.advantages_T > 0, config.sapo_tau_pos, config.sapo_tau_neg, log_ratio_T)
    open_T = torch.sigmoid(tau_T * (bounded_exp(log_ratio_T) - 1))
    slope_T = 4 * (open_T * (1 - open_T)).detach()
    loss_T = -4 / tau_T * open_T * inputs.advantages_T
    return PolicyTerms(loss_T, torch.zeros_like(loss_T), log_ratio_T, {"sapo_weight": slope_T})


@register_policy_loss("vespo", trust_region=True)
def vespo(config: PolicyLossConfig, inputs: PolicyInputs) -> PolicyTerms:
    """-sg(phi(W)) A log p with phi(W) = W^k e^(lambda (1 - W)) (VESPO, 2602.10693).

    W is the ratio of the whole sequence, the product of its tokens' and not their mean; k and lambda depend on the sign
    of the advantage. phi is 1 on policy, and reported as vespo_weight. log W is kept within [log 1e-8, 20].
    """
    log_ratio_T = inputs.log_probs_T - inputs.old_log_probs_T
    bounded_T = log_ratio_T.detach().clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    log_w_B = inputs.packing.sum(keep_where(inputs.mask_T, bounded_T)).clamp(_LOWEST_SEQUENCE_RATIO, LOG_RATIO_BOUND)
    log_w_T = inputs.packing.expand(log_w_B)
    gains_T = inputs.advantages_T >= 0
    k_T = _where(gains_T, config.vespo_k_pos, config.vespo_k_neg, log_w_T)
    lambda_T = _where(gains_T, config.vespo_lambda_pos, config.vespo_lambda_neg, log_w_T)
    weight_T = torch.exp(k_T * log_w_T + lambda_T * (1 - log_w_T.exp()))
    loss_T = -weight_T * inputs.advantages_T * inputs.log_probs_T
    metrics_T = {"vespo_weight": weight_T, "vespo_log_ratio": log_w_T}
    return PolicyTerms(loss_T, torch.zeros_like(loss_T), log_ratio_T, metrics_T)


@register_policy_loss("dro", trust_region=True)
def dro(config: PolicyLossConfig, inputs: PolicyInputs) -> PolicyTerms:
    """-(A log p - beta / 2 (log p - log q)^2) of each token, q the old policy: direct reward optimisation.

    The paper's (2405.19107, offline) regresses r - V on tau log(p / q) of whole responses. The gradient of that is tau
    times this loss's, where beta is tau, r - V the advantage, and a response takes the place of a token. Token by token
    it is the form of tinker (https://tinker-docs.thinkingmachines.ai/tinker/losses/dro) and of verl.

    Raises ValueError without `dro_beta`.
    """
    if config.dro_beta is None:
        raise ValueError("policy loss dro needs dro_beta, the weight of the squared log ratio")
    log_ratio_T = inputs.log_probs_T - inputs.old_log_probs_T
    penalty_T = config.dro_beta / 2 * log_ratio_T.square()
    loss_T = penalty_T - inputs.advantages_T * inputs.log_probs_T
    return PolicyTerms(loss_T, torch.zeros_like(loss_T), log_ratio_T, {"dro_penalty": penalty_T.detach()})


def _where(mask_T: torch.Tensor, there: float, elsewhere: float, like_T: torch.Tensor) -> torch.Tensor:
    """One of two numbers for each token, in the dtype of `like_T`."""
    return torch.full_like(like_T, elsewhere, requires_grad=False).masked_fill(mask_T, there)
