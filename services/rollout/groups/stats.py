"""Statistics of one group, and a sample of it for people."""

from __future__ import annotations

import json
from collections.abc import Sequence

from miles.rpc.gen import rollout_pb2
from miles.types import Sample, SampleStatus, reward_number


def group_stats(
    samples: Sequence[Sample], reward_key: str | None, *, generate_s: float, reward_s: float
) -> rollout_pb2.GroupStats:
    """Sum over the samples; those without a reward are left out of the reward sums. Raises RewardKeyError."""
    rewards = _rewards(samples, reward_key)
    return rollout_pb2.GroupStats(
        samples=len(samples),
        response_tokens=sum(sample.response_length for sample in samples),
        max_response_tokens=max((sample.response_length for sample in samples), default=0),
        truncated=sum(sample.status is SampleStatus.TRUNCATED for sample in samples),
        failed=sum(sample.status is SampleStatus.FAILED for sample in samples),
        reward_sum=sum(rewards),
        reward_square_sum=sum(reward * reward for reward in rewards),
        generate_s=generate_s,
        reward_s=reward_s,
    )


_EXAMPLE_TEXT = 400
"""Characters of each text of an example."""


def rewards_are_equal(samples: Sequence[Sample], reward_key: str | None) -> bool:
    """Return whether all samples that have a reward have the same one; true of a single sample."""
    return len(set(_rewards(samples, reward_key))) == 1


def scored_example(samples: Sequence[Sample], reward_key: str | None) -> rollout_pb2.ScoredExample:
    """Return the group's first sample with its texts cut short, and the rewards of all."""
    first = samples[0]
    prompt = first.prompt if isinstance(first.prompt, str) else json.dumps(first.prompt, ensure_ascii=False)
    return rollout_pb2.ScoredExample(
        prompt=prompt[-_EXAMPLE_TEXT:],  # the question comes last
        response=first.response[-_EXAMPLE_TEXT:],  # and so does the answer
        label=(first.label or "")[:_EXAMPLE_TEXT],
        rewards=_rewards(samples, reward_key),
    )


def _rewards(samples: Sequence[Sample], reward_key: str | None) -> list[float]:
    return [reward_number(sample.reward, reward_key) for sample in samples if sample.reward is not None]
