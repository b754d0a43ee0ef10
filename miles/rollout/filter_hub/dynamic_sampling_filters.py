"""The built-in filters of dynamic sampling (DAPO, arXiv:2503.14476, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from miles.rollout.filter_hub.base_types import DynamicFilterOutput
from miles.types import reward_number
from miles.utils.types import Sample


def check_reward_nonzero_std(args: Any, samples: Sequence[Sample], **_: Any) -> DynamicFilterOutput:
    """Keep a group whose rewards differ: equal rewards give no advantage and so no gradient.

    Samples that failed are ignored; fewer than two rewards have no spread.
    """
    rewards = [reward_number(sample.reward, args.reward_key) for sample in samples if sample.reward is not None]
    if len(set(rewards)) > 1:
        return DynamicFilterOutput(True)
    return DynamicFilterOutput(False, f"zero_std_{rewards[0]:g}" if rewards else "no_reward")


def check_no_aborted(args: Any, samples: Sequence[Sample], **_: Any) -> DynamicFilterOutput:
    """Drop a group in which a sample failed, or was given up by the function that generates."""
    given_up = (Sample.Status.ABORTED, Sample.Status.FAILED)
    if any(sample.status in given_up for sample in samples):
        return DynamicFilterOutput(False, "group_has_aborted")
    return DynamicFilterOutput(True)
