"""Metrics of the groups that a step trains on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from miles.telemetry.pass_at_k import pass_rates
from miles.types import Sample, SampleGroup, SampleStatus, reward_number


def rollout_metrics(
    groups: Sequence[SampleGroup], reward_key: str | None, *, with_pass_rates: bool = False
) -> dict[str, float]:
    """`rollout/*` over the samples of one step.

    Rewards with several numbers have the mean of each in `rollout/reward/NAME`. `rollout/zero_std/count` counts groups
    whose rewards are all equal (no learning signal), and `rollout/zero_std/count_R` those of them with reward R.
    Samples without a reward count as failed only. With speculative decoding, `rollout/spec_accept_length` is the mean
    number of tokens per verification, and `rollout/spec_accept_rate` the share of draft tokens that were accepted. With
    `with_pass_rates`, `passrate/pass@k` besides, over groups of which every sample has a reward.
    """
    samples = [sample for group in groups for sample in group.samples]
    lengths = [sample.response_length for sample in samples]
    by_group = [
        [reward_number(s.reward, reward_key) for s in group.samples if s.reward is not None] for group in groups
    ]
    rewards = [reward for group in by_group for reward in group]
    flat = Counter(group[0] for group in by_group if group and min(group) == max(group))
    metrics = {
        "rollout/samples": float(len(samples)),
        "rollout/response_tokens": float(sum(lengths)),
        "rollout/response_len/mean": sum(lengths) / len(samples),
        "rollout/response_len/max": float(max(lengths)),
        "rollout/truncated_ratio": _share(samples, SampleStatus.TRUNCATED),
        "rollout/failed_ratio": _share(samples, SampleStatus.FAILED),
        "rollout/zero_std/count": float(flat.total()),
    }
    metrics |= {f"rollout/zero_std/count_{reward:g}": float(count) for reward, count in sorted(flat.items())}
    if rewards:
        metrics["rollout/raw_reward"] = sum(rewards) / len(rewards)
    parts = [sample.reward for sample in samples if isinstance(sample.reward, dict)]
    for name in sorted(parts[0]) if parts else ():
        if all(name in part for part in parts):
            metrics[f"rollout/reward/{name}"] = sum(part[name] for part in parts) / len(parts)
    metrics |= _acceptance(samples)
    if with_pass_rates:
        metrics |= pass_rates(by_group, max(len(group.samples) for group in groups), "passrate/")
    return metrics


def _share(samples: Sequence[Sample], status: SampleStatus) -> float:
    return sum(sample.status is status for sample in samples) / len(samples)


def _acceptance(samples: Sequence[Sample]) -> dict[str, float]:
    drafted = [sample.speculative for sample in samples if sample.speculative is not None]
    verified = sum(stats.verify_count for stats in drafted)
    proposed = sum(stats.proposed_draft_tokens for stats in drafted)
    if not verified or not proposed:
        return {}
    accepted = sum(stats.accepted_draft_tokens for stats in drafted)
    return {
        "rollout/spec_accept_length": 1 + accepted / verified,
        "rollout/spec_accept_rate": accepted / proposed,
    }
