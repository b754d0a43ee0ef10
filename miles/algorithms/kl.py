"""Estimators of KL(policy || base) from the log-probs of sampled tokens (http://joschu.net/blog/kl-approx.html)."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from miles.algorithms.packing import as_float

KlType = Literal["k1", "k2", "k3", "low_var_kl"]

LOG_RATIO_BOUND = 20.0
"""Log ratios are clamped to this before they are exponentiated: e^20 = 4.9e8 is far outside any trust region."""

_LOW_VAR_KL_BOUND = 10.0
_EXP_BOUND = 40.0
"""Bound of the exponents of k3 and of its importance ratio; their product, up to e^80 = 5.5e34, still fits float32."""


def approximate_kl(
    log_probs: torch.Tensor,
    base_log_probs: torch.Tensor,
    kl_type: str,
    old_log_probs: torch.Tensor | None = None,
) -> torch.Tensor:
    """KL of each token, in nats, with x = log_probs - base_log_probs.

    k1: x. k2: x^2 / 2. k3: e^-x - 1 + x, x at least -40. low_var_kl: k3 with x clamped to +-20 and the result to +-10.

    With `old_log_probs` the estimate is unbiased for tokens sampled from the old policy: multiplied by
    exp(log_probs - old_log_probs) (DeepSeek-V3.2, section 3.1), gradient included, before low_var_kl's last clamp.

    Args:
        log_probs: of the policy, any shape; carries the gradient.
        base_log_probs: of the base (reference) policy, same shape.
        kl_type: one of `KlType`.
        old_log_probs: of the policy that the tokens were sampled from, same shape; None: no importance ratio.

    Returns:
        float32 (float64 stays), the same shape.

    Raises:
        ValueError: unknown `kl_type`.
    """
    x = as_float(log_probs) - as_float(base_log_probs)
    if kl_type == "k1":
        kl = x
    elif kl_type == "k2":
        kl = x.square() / 2
    elif kl_type in ("k3", "low_var_kl"):
        x = x.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND) if kl_type == "low_var_kl" else x.clamp_min(-_EXP_BOUND)
        kl = torch.expm1(-x) + x
    else:
        raise ValueError(f"unknown kl_loss_type {kl_type!r}; choose from {', '.join(get_args(KlType))}")
    if old_log_probs is not None:
        log_ratio = as_float(log_probs) - as_float(old_log_probs)
        kl = kl * log_ratio.clamp(-_EXP_BOUND, _EXP_BOUND).exp()
    if kl_type == "low_var_kl":
        kl = kl.clamp(-_LOW_VAR_KL_BOUND, _LOW_VAR_KL_BOUND)
    return kl
