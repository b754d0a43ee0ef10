"""Reference formulas in float64, one sample and one token at a time, to compare the package with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Tokens = Sequence[float]


def clamp(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def group_standardized(rewards: Tokens, normalise_std: bool = True) -> list[float]:
    mean = math.fsum(rewards) / len(rewards)
    centred = [r - mean for r in rewards]
    if not normalise_std or len(rewards) < 2:
        return centred
    std = math.sqrt(math.fsum(c * c for c in centred) / (len(rewards) - 1))
    return [c / (std + 1e-6) for c in centred] if std > 0 else centred


def kl(log_prob: float, base: float, kl_type: str, old: float | None = None) -> float:
    x = log_prob - base
    if kl_type == "low_var_kl":
        x = clamp(x, -20, 20)
    value = {"k1": x, "k2": x * x / 2, "k3": math.exp(-x) - 1 + x, "low_var_kl": math.exp(-x) - 1 + x}[kl_type]
    if old is not None:
        value *= math.exp(log_prob - old)
    return clamp(value, -10, 10) if kl_type == "low_var_kl" else value


def discounted_returns(rewards: Tokens, gamma: float) -> list[float]:
    returns, running = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        running = rewards[t] + gamma * running
        returns[t] = running
    return returns


def gae(
    rewards: Tokens, values: Tokens, mask: Sequence[int], reward: float, gamma: float, lambd: float
) -> tuple[list[float], list[float]]:
    kept = [t for t in range(len(mask)) if mask[t]]
    advantages, returns = [0.0] * len(mask), [0.0] * len(mask)
    running, next_value = 0.0, 0.0
    for t in reversed(kept):
        r = rewards[t] + (reward if t == kept[-1] else 0.0)
        running = r + gamma * next_value - values[t] + gamma * lambd * running
        advantages[t], returns[t] = running, running + values[t]
        next_value = values[t]
    return advantages, returns


def whitened(values: Tokens, mask: Sequence[int]) -> list[float]:
    kept = [v for v, m in zip(values, mask, strict=True) if m]
    mean = math.fsum(kept) / len(kept)
    variance = math.fsum((v - mean) ** 2 for v in kept) / max(len(kept) - 1, 1)
    return [(v - mean) / math.sqrt(variance + 1e-8) for v in values]


def ppo_token_loss(log_ratio: float, advantage: float, low: float, high: float, dual: float | None = None) -> float:
    ratio = math.exp(clamp(log_ratio, -20, 20))
    loss = max(-ratio * advantage, -clamp(ratio, 1 - low, 1 + high) * advantage)
    if dual is not None and advantage < 0:
        loss = min(-dual * advantage, loss)
    return loss


def log_prob_and_entropy(
    logits_TV: torch.Tensor, tokens_T: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole float64 log-softmax at once."""
    log_p_TV = torch.log_softmax(logits_TV.double() / temperature, dim=-1)
    entropy_T = -(log_p_TV.exp() * log_p_TV).sum(-1)
    return log_p_TV.gather(-1, tokens_T.long()[:, None]).squeeze(-1), entropy_T


def sum_of_sample_means(values: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for value, mask in zip(values, masks, strict=True):
        total = total + (value * mask).sum() / max(float(mask.sum()), 1.0)
    return total
