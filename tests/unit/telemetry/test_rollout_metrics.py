"""Metrics of the groups of a step."""

from __future__ import annotations

import numpy as np

from miles.telemetry.rollout_metrics import rollout_metrics
from miles.types import Sample, SampleGroup, SampleStatus, SpeculativeStats


def group(group_id: int, *samples: tuple[int, float | dict[str, float] | None, SampleStatus]) -> SampleGroup:
    made = [
        Sample(group_id=group_id, index=i, prompt="p", tokens=np.zeros(2 + n, np.int32), response_length=n,
               reward=reward, status=status)
        for i, (n, reward, status) in enumerate(samples)
    ]  # fmt: skip
    return SampleGroup("job", group_id, made)


def test_metrics_are_means_over_samples_and_flat_groups_are_counted_by_reward() -> None:
    done, cut, failed = SampleStatus.COMPLETED, SampleStatus.TRUNCATED, SampleStatus.FAILED
    groups = [
        group(0, (3, 1.0, done), (7, 0.0, cut)),
        group(1, (2, 1.0, done), (2, 1.0, done)),
        group(2, (5, None, failed), (5, 0.0, done)),
    ]
    metrics = rollout_metrics(groups, None)
    assert metrics["rollout/raw_reward"] == 3 / 5
    assert metrics["rollout/response_len/mean"] == 4
    assert metrics["rollout/response_len/max"] == 7
    assert metrics["rollout/truncated_ratio"] == 1 / 6
    assert metrics["rollout/failed_ratio"] == 1 / 6
    assert metrics["rollout/zero_std/count"] == 2
    assert metrics["rollout/zero_std/count_1"] == 1
    assert metrics["rollout/zero_std/count_0"] == 1


def test_the_part_of_a_reward_that_is_trained_on_is_reported() -> None:
    done = SampleStatus.COMPLETED
    groups = [group(0, (1, {"a": 1.0, "b": 4.0}, done), (1, {"a": 2.0, "b": 5.0}, done))]
    metrics = rollout_metrics(groups, "b")
    assert (metrics["rollout/raw_reward"], metrics["rollout/reward/a"], metrics["rollout/reward/b"]) == (4.5, 1.5, 4.5)


def test_without_any_reward_there_is_no_mean() -> None:
    assert "rollout/raw_reward" not in rollout_metrics([group(0, (1, None, SampleStatus.FAILED))], None)


def test_acceptance_is_that_of_the_samples_with_drafts() -> None:
    done = SampleStatus.COMPLETED
    groups = [group(0, (8, 1.0, done), (8, 1.0, done), (8, 1.0, done))]
    assert "rollout/spec_accept_length" not in rollout_metrics(groups, None)
    first, second, _ = groups[0].samples
    first.speculative = SpeculativeStats(accepted_draft_tokens=4, proposed_draft_tokens=12, verify_count=4)
    second.speculative = SpeculativeStats(accepted_draft_tokens=6, proposed_draft_tokens=8, verify_count=1)
    metrics = rollout_metrics(groups, None)
    assert (metrics["rollout/spec_accept_length"], metrics["rollout/spec_accept_rate"]) == (3.0, 0.5)
    second.speculative = first.speculative = SpeculativeStats()
    assert "rollout/spec_accept_length" not in rollout_metrics(groups, None)


def test_pass_rates_are_those_of_groups_whose_samples_all_have_rewards() -> None:
    done, failed = SampleStatus.COMPLETED, SampleStatus.FAILED
    groups = [
        group(0, (3, 1.0, done), (7, 0.0, done)),
        group(1, (2, 1.0, done), (2, 1.0, done)),
        group(2, (5, None, failed), (5, 1.0, done)),
    ]
    metrics = rollout_metrics(groups, None, with_pass_rates=True)
    assert (metrics["passrate/pass@1"], metrics["passrate/pass@2"]) == (0.75, 1.0)
    assert "passrate/pass@1" not in rollout_metrics(groups, None)
