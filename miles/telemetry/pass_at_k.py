"""The chance that one of k samples is right."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def pass_at_ks(samples: int) -> list[int]:
    """The powers of two up to the number of samples; none for a single sample."""
    return [1 << i for i in range(int(math.log2(samples)) + 1)] if samples > 1 else []


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right (Chen et al. 2021, arXiv:2107.03374, eq. 1)."""
    if samples - correct < k:
        return 1.0
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def pass_rates(groups: Iterable[Sequence[float]], samples: int, prefix: str) -> dict[str, float]:
    """Mean pass@k over the groups by name, `prefix` before it; a reward of 1 is right.

    `groups` hold the rewards of each prompt's samples. Those with fewer than `samples` are left out, as an estimate
    from fewer is of another k.
    """
    complete = [sum(reward == 1 for reward in group) for group in groups if len(group) == samples]
    if not complete:
        return {}
    return {
        f"{prefix}pass@{k}": sum(pass_at_k(samples, correct, k) for correct in complete) / len(complete)
        for k in pass_at_ks(samples)
    }
