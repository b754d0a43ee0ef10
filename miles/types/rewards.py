"""Selects the number of a reward that is trained on."""

from __future__ import annotations

from miles.types.sample import Reward


class RewardKeyError(ValueError):
    """A reward has several parts and the configured key names none of them."""


def reward_number(reward: Reward, key: str | None) -> float:
    """Return the number of a reward: itself, or its part `key`. Raises RewardKeyError."""
    if not isinstance(reward, dict):
        return float(reward)
    if key is None or key not in reward:
        raise RewardKeyError(
            f"the reward has the parts {', '.join(sorted(reward))}, but the configured key is {key!r}; "
            "set --reward-key (for evaluation --eval-reward-key) to one of them"
        )
    return float(reward[key])
