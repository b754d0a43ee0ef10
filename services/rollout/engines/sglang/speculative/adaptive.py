"""How many tokens SGLang drafts at each batch size: the tiers of its --speculative-adaptive-config. Pure.

Within a tier SGLang itself picks among the candidate steps: it drafts more while its moving mean of accepted drafts
comes near the present number of steps, and fewer when it falls behind (`adaptive_spec_params.py`). The tiers say which
candidates there are.
"""

from __future__ import annotations

from typing import Any

VERIFIED_TOKENS = 256
"""Tokens of a forward pass up to which more of them cost next to nothing, because reading the weights takes as long: a
GPU's operations per byte of memory bandwidth, about 200 in bfloat16 on an H100 or H200."""
_TIER_STARTS = (1, 8, 32, 64, 128)
_DOWN_HYSTERESIS = -0.25
"""Drafts end below 0.5 - 0.25 accepted ones per verification, which pay for one step of a small draft."""
_MANY_STEPS = 4


def adaptive_config(num_steps: int, *, may_end: bool = True) -> dict[str, Any]:
    """Tiers by batch size, as the JSON that SGLang reads.

    Args:
        num_steps: Most steps, which the smallest batches may use.
        may_end: Whether 0 steps, which is no drafts, are among the candidates. SGLang's own rejection sampling fails
            in a step without drafts.

    From one tier's start to the next's, as many steps are candidates as keep all verified tokens of the largest batch
    within `VERIFIED_TOKENS`. At 128 requests or more nothing is drafted.
    """
    tiers: dict[str, Any] = {"down_hysteresis": _DOWN_HYSTERESIS}
    for start, end in zip(_TIER_STARTS, (*_TIER_STARTS[1:], None), strict=True):
        most = num_steps if start == 1 else 0 if end is None else min(num_steps, VERIFIED_TOKENS // end - 1)
        tiers[str(start)] = {"candidate_steps": _candidates(most, may_end)}
    return tiers


def _candidates(most: int, may_end: bool) -> list[int]:
    """Few, because each costs CUDA graphs of its own."""
    fewest = 0 if may_end else 1
    middle = (most + 1) // 2 if most >= _MANY_STEPS else most
    return sorted({max(fewest, step) for step in (fewest, min(1, most), middle, most)})
