"""Metrics of a batch of groups from the statistics that came with each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from miles.rpc.gen import rollout_pb2


def batch_metrics(groups: Iterable[rollout_pb2.GroupStats], staleness: Sequence[int]) -> dict[str, float]:
    """`rollout/*` metrics over the groups of one training step.

    `rollout/zero_std/*` count groups whose rewards are all equal (no learning signal), by that reward.
    """
    stats = list(groups)
    metrics: dict[str, float] = {}
    samples = sum(group.samples for group in stats)
    if samples:
        tokens = sum(group.response_tokens for group in stats)
        metrics["rollout/raw_reward"] = sum(group.reward_sum for group in stats) / samples
        metrics["rollout/response_len/mean"] = tokens / samples
        metrics["rollout/response_len/max"] = max(group.max_response_tokens for group in stats)
        metrics["rollout/truncated_ratio"] = sum(group.truncated for group in stats) / samples
        metrics["rollout/failed_samples"] = sum(group.failed for group in stats)
        metrics["rollout/response_tokens"] = tokens
        metrics["rollout/samples"] = samples
        flat = [group for group in stats if group.samples and is_flat(group)]
        metrics["rollout/zero_std/count"] = len(flat)
        for group in flat:
            name = f"rollout/zero_std/count_{group.reward_sum / group.samples:g}"
            metrics[name] = metrics.get(name, 0) + 1
        metrics["perf/reward_wait_time"] = max(group.reward_s for group in stats)
    if staleness:
        metrics["rollout/fully_async/avg_staleness"] = sum(staleness) / len(staleness)
        metrics["rollout/fully_async/max_staleness"] = max(staleness)
    return metrics


def is_flat(group: rollout_pb2.GroupStats) -> bool:
    """Whether all rewards of a group are equal, up to rounding of the sums."""
    mean = group.reward_sum / group.samples
    variance = group.reward_square_sum / group.samples - mean * mean
    return math.sqrt(max(variance, 0.0)) <= 1e-6 * max(1.0, abs(mean))
