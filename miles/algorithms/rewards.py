"""Reward shaping within each prompt group, before training: one number per sample, from one reward or several."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

RewardShaping = Callable[[torch.Tensor], torch.Tensor]
"""Maps the float64 rewards of one group, [n], to the estimator's input, [n]."""

STD_EPSILON = 1e-6
LARGEST_REWARD = 1e37
"""What every shaping keeps within float32."""


def keep_rewards(rewards: torch.Tensor) -> torch.Tensor:
    """No shaping."""
    return rewards


def subtract_mean(rewards: torch.Tensor) -> torch.Tensor:
    """r - mean; exactly 0 in a group of one or without spread, where a rounded mean may differ from every reward."""
    return rewards - (rewards[0] if _all_equal(rewards) else rewards.mean())


def standardize(rewards: torch.Tensor) -> torch.Tensor:
    """(r - mean) / (unbiased std + 1e-6) (GRPO, 2402.03300); not divided in a group of one sample or without spread."""
    if _all_equal(rewards):
        return rewards - rewards[0]
    return (rewards - rewards.mean()) / (rewards.std(correction=1) + STD_EPSILON)


def subtract_leave_one_out_mean(rewards: torch.Tensor) -> torch.Tensor:
    """r_i - mean of the others' rewards = (r_i - mean) * n / (n - 1) (RLOO, 2402.14740).

    A group of one has no others to compare with and gives 0.
    """
    n = len(rewards)
    return subtract_mean(rewards) * (n / max(n - 1, 1))


def divide_by_mean(rewards: torch.Tensor) -> torch.Tensor:
    """(r - mean) / mean (MaxRL, 2602.02710); 0 in a group without any reward, which says nothing about what succeeds.

    Raises ValueError for a negative reward: the mean stands for the rate of success.
    """
    if (rewards < 0).any():
        problem = f"maxrl divides by the mean of a prompt's rewards, and one of them is {rewards.min().item():g}"
        raise ValueError(f"{problem}; give rewards of at least 0, or use another advantage_estimator")
    mean = rewards.mean()
    return subtract_mean(rewards) / mean if mean > 0 else torch.zeros_like(rewards)


def _all_equal(rewards: torch.Tensor) -> bool:
    return len(set(rewards.tolist())) == 1


def shape_groups(
    rewards_B: torch.Tensor | Sequence[float], group_ids_B: torch.Tensor | Sequence[Hashable], shaping: RewardShaping
) -> torch.Tensor:
    """Apply `shaping` to each group's rewards.

    Args:
        rewards_B: one finite number a sample; all samples of a group must be present.
        group_ids_B: which prompt each sample belongs to; samples of a group need not be adjacent.
        shaping: see `RewardShaping`.

    Returns:
        float32 [B] on the CPU, in the order given.

    Raises:
        ValueError: lengths differ, or a reward is not finite, or larger than `LARGEST_REWARD`.
    """
    return _shape_groups(rewards_B, group_ids_B, shaping).float()


def shape_several(
    rewards_BK: torch.Tensor,
    weights_K: Sequence[float],
    group_ids_B: torch.Tensor | Sequence[Hashable],
    shaping: RewardShaping,
) -> torch.Tensor:
    """Shape each of K rewards on its own, add them up by weight, and normalise over the batch (GDPO, 2601.05242).

    The last step is division by (std + 1e-6) of the weighted sums of all samples; their mean, which the paper
    subtracts, is 0 because every group's is. So a group without spread in any reward keeps 0 exactly.

    Args:
        rewards_BK: finite numbers; all samples of the batch must be present.
        weights_K: one weight a reward.
        group_ids_B: as in `shape_groups`.
        shaping: of one reward of one group; it has to subtract the group's mean.

    Returns:
        float32 [B] on the CPU.

    Raises:
        ValueError: as `shape_groups`, or the numbers of rewards and weights differ.
    """
    rewards = rewards_BK.to("cpu", torch.float64)
    summed = torch.zeros(len(rewards), dtype=torch.float64)
    for rewards_B, weight in zip(rewards.unbind(1), weights_K, strict=True):
        summed += weight * _shape_groups(rewards_B, group_ids_B, shaping)
    spread = (summed.square().sum() / max(len(summed) - 1, 1)).sqrt()
    return (summed / (spread + STD_EPSILON)).float()


def _shape_groups(
    rewards_B: torch.Tensor | Sequence[float], group_ids_B: torch.Tensor | Sequence[Hashable], shaping: RewardShaping
) -> torch.Tensor:
    """`shape_groups` in float64."""
    rewards = torch.as_tensor(rewards_B, dtype=torch.float64, device="cpu").reshape(-1)
    ids = group_ids_B.tolist() if isinstance(group_ids_B, torch.Tensor) else list(group_ids_B)
    if len(ids) != len(rewards):
        raise ValueError(f"{len(rewards)} rewards but {len(ids)} group ids")
    bad = (~(rewards.abs() <= LARGEST_REWARD)).nonzero().flatten().tolist()
    if bad:
        problem = f"reward of sample {bad[0]} is {rewards[bad[0]].item()}"
        raise ValueError(f"{problem}; drop failed samples before training, and scale rewards beyond {LARGEST_REWARD:g}")
    members: dict[Hashable, list[int]] = {}
    for i, group_id in enumerate(ids):
        members.setdefault(group_id, []).append(i)
    shaped = torch.empty_like(rewards)
    for indices in members.values():
        first, last = indices[0], indices[-1]
        adjacent = last - first + 1 == len(indices)  # a slice is much faster than a list
        where = slice(first, last + 1) if adjacent else torch.tensor(indices)
        shaped[where] = shaping(rewards[where])
    return shaped
