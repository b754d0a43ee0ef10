"""Whether something bounds how far samples of older versions may move the policy."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.notes.registry import Note, noted
from miles.config.schema.flat_settings import FlatSettings

CLIPPED = frozenset(
    {"grpo", "gspo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo", "cispo"}
)
"""Advantage estimators whose policy loss has a trust region: it is clipped at 1 + eps_clip_high."""
NO_BOUND = 100.0
"""An upper bound of ratios, or of importance weights, from which on it is none in practice."""
_WAYS_OUT = "clip the ratio to the engine (use_rollout_logprobs, with grpo, gspo or cispo), bound its weights (use_tis,"
_WAYS_OUT += " use_icepop or use_mis), or lower max_weight_staleness"


@noted
def stale_samples_are_bounded(s: FlatSettings) -> Iterator[Note]:
    if warning := staleness_warning(s):
        yield Note("max_weight_staleness", s.max_weight_staleness, warning)


def staleness_warning(s: FlatSettings) -> str:
    """What to tell people about samples that are several versions old; empty when nothing."""
    if s.max_weight_staleness <= 1 or not (why := why_unbounded(s)):
        return ""
    return f"samples may be {s.max_weight_staleness} versions old, and {why}; {_WAYS_OUT}"


def why_unbounded(s: FlatSettings) -> str | None:
    """Say why nothing bounds a step on samples of older versions; None where something does."""
    if s.use_icepop or (s.use_mis and s.use_rs and s.rs_upper_bound < NO_BOUND):
        return None
    if s.use_tis:
        key = "tis_upper_bound" if s.use_mis else "tis_clip"
        return None if getattr(s, key) < NO_BOUND else f"{key} = {getattr(s, key):g} bounds no weight of the correction"
    if s.num_steps_per_rollout == 1 and not (s.use_rollout_logprobs or s.keep_old_actor):
        return "in a rollout's only step the ratio that is clipped is 1, as old log-probabilities are the trainer's"
    if s.advantage_estimator not in CLIPPED:
        return f"the loss of {s.advantage_estimator} has no trust region"
    if s.eps_clip_high >= NO_BOUND:
        return f"eps_clip_high = {s.eps_clip_high:g} clips no ratio"
    return None
