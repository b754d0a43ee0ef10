"""Why servers draft less than they may, or what speaks against their drafts, in words. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from miles.config.sglang.adaptive_steps import why_not_adaptive
from miles.config.speculation import Speculation
from miles.services.rollout.engines.base import SpeculationCounts

ENOUGH = 1000
"""Verifications from which on a mean says something."""
SELDOM = 1.1
"""Tokens per verification up to which drafts hardly pay, whatever they cost."""


def why_fewer(drafts: Speculation, bound: int, steps: Sequence[int], counts: Sequence[SpeculationCounts]) -> str:
    """Why fewer than `bound` steps are drafted, or should be; empty when nothing is to be said.

    Args:
        drafts: What servers draft with.
        bound: Most steps.
        steps: What each server that answered drafts now.
        counts: Of the pairs of versions, that of now last.
    """
    off = sum(step == 0 for step in steps)
    if off:
        return (
            f"{off} of {len(steps)} servers draft nothing now: at their batch size too little is accepted, or the "
            "verified tokens would cost as much as sampled ones"
        )
    if steps and max(steps) < bound:
        most = max(steps)
        return f"{most} of {bound} steps are drafted now: more are not accepted, or cost too much at this batch size"
    if counts and counts[-1].verify_count >= ENOUGH and (problem := why_not_adaptive(drafts, {})) is not None:
        length = 1 + counts[-1].accepted_draft_tokens / counts[-1].verify_count
        if length <= SELDOM:
            return f"drafts do not pay at {length:.2f} tokens per verification, and {problem}: leave them out"
    return ""
