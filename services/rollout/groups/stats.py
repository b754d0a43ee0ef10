"""Statistics of one group."""

from __future__ import annotations

from collections.abc import Sequence

from miles.rpc.gen import rollout_pb2
from miles.types import Sample, SampleStatus, reward_number


def group_stats(
    samples: Sequence[Sample], reward_key: str | None, *, generate_s: float, reward_s: float
) -> rollout_pb2.GroupStats:
    """Sum over the samples; those without a reward are left out of the reward sums. Raises RewardKeyError."""
    rewards = [reward_number(sample.reward, reward_key) for sample in samples if sample.reward is not None]
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
