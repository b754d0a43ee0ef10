"""The optimal token baseline (OTB, 2602.07078): a baseline for each position of a prompt's responses.

Of the samples of a group that reach position t, B_t = sum G W_t / sum W_t: the mean of their returns, weighted by the
gradient energy that each has gathered until then. The squared norm of a token's gradient is approximated by that with
respect to the logits, 1 - 2 p + sum of all tokens' p^2, which a forward pass gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from miles.algorithms.collectives import all_reduce_max, all_reduce_sum
from miles.algorithms.estimators import AdvantageBatch, AdvantageConfig, register_estimator
from miles.algorithms.packing import Packing, as_float, keep_log_probs, keep_where

if TYPE_CHECKING:
    import torch.distributed as dist

_EPSILON = 1e-8
_BLOCK = 2**23
"""Numbers that ranks add up at a time: 64 MiB in float64."""


@register_estimator("optimal_token_baseline", needs_squared_probs=True)
def optimal_token_baseline(
    config: AdvantageConfig, batch: AdvantageBatch, kl_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A_t = G - B_t over the trainable tokens; the return G is the reward, on every token of its sample.

    Positions count trainable tokens alone, as several turns' do. Where one sample alone reaches a position, or has a
    group to itself, B_t is 0. The samples of a group may be spread over ranks, all of which must call.

    Raises:
        ValueError: the batch lacks log-probs, their squares, or the samples' groups.
    """
    kept_T = batch.mask_T.bool()
    lengths = Packing(tuple(int(n) for n in batch.packing.sum(kept_T.long()).tolist()))
    energies = lengths.split(_token_energies(batch, kept_T)[kept_T].double().cpu())
    weights = [energy.cumsum(0) for energy in energies]
    rewards = batch.rewards_B.double().cpu().tolist()
    assert batch.group_ids_B is not None
    groups = batch.group_ids_B.tolist()
    baselines = _baselines(weights, rewards, groups, batch.num_groups, batch.mask_T.device, batch.process_group)
    parts = [reward - baselines[g][:n] for reward, g, n in zip(rewards, groups, lengths.lengths, strict=True)]
    advantages = torch.cat(parts) if parts else torch.zeros(0)
    returns_T = batch.packing.expand(as_float(batch.rewards_B))
    advantages_T = torch.zeros_like(kl_T).masked_scatter(kept_T, advantages.to(kl_T.device, kl_T.dtype))
    return advantages_T, returns_T


def _token_energies(batch: AdvantageBatch, kept_T: torch.Tensor) -> torch.Tensor:
    """1 - 2 p + sum p^2, at least 0; [T], 0 where masked."""
    missing = [name for name in ("old_log_probs_T", "squared_probs_T", "group_ids_B") if getattr(batch, name) is None]
    if missing:
        raise ValueError(f"optimal_token_baseline needs AdvantageBatch.{missing[0]}")
    assert batch.old_log_probs_T is not None
    assert batch.squared_probs_T is not None
    p_T = keep_log_probs(kept_T, batch.old_log_probs_T).exp()
    return keep_where(kept_T, 1 - 2 * p_T + as_float(batch.squared_probs_T)).clamp_min(0)


def _baselines(
    weights: list[torch.Tensor],
    rewards: list[float],
    groups: list[int],
    num_groups: int,
    device: torch.device,
    process_group: dist.ProcessGroup | None,
) -> dict[int, torch.Tensor]:
    """The baseline of every position, of the groups that this rank has samples of; float64 on the CPU.

    Sums are taken sample by sample in a fixed order, so that they repeat bit for bit.
    """
    longest = torch.tensor(max((len(w) for w in weights), default=0), device=device)
    positions = int(all_reduce_max(longest, process_group))
    found: dict[int, torch.Tensor] = {}
    size = max(1, _BLOCK // max(3 * positions, 1))
    for first in range(0, num_groups, size):
        block = range(first, min(first + size, num_groups))
        sums_G3P = torch.zeros(len(block), 3, positions, dtype=torch.float64)
        for weight, reward, g in zip(weights, rewards, groups, strict=True):
            if g in block:
                part_3P = sums_G3P[g - first, :, : len(weight)]
                part_3P += torch.stack([weight * reward, weight, torch.ones_like(weight)])
        weighted_GP, total_GP, count_GP = all_reduce_sum(sums_G3P.to(device), process_group).cpu().unbind(1)
        baseline_GP = torch.where(count_GP > 1, weighted_GP / (total_GP + _EPSILON), 0.0)
        found |= {g: baseline_GP[g - first] for g in sorted(set(groups)) if g in block}
    return found
