"""Numbers of a batch, of an evaluation, and seeds."""

from __future__ import annotations

import itertools

import pytest

from miles.rpc.gen.rollout_pb2 import GroupStats
from miles.services.controller.evaluation import pass_at_k, pass_at_ks, reward_number
from miles.services.controller.rollout_metrics import batch_metrics
from miles.services.controller.seeds import sample_seed


def test_batch_metrics_are_means_over_samples() -> None:
    groups = [
        GroupStats(
            samples=2, response_tokens=10, max_response_tokens=7, truncated=1, reward_sum=1, reward_square_sum=1
        ),
        GroupStats(samples=2, response_tokens=4, max_response_tokens=2, reward_sum=2, reward_square_sum=2),
    ]
    metrics = batch_metrics(groups, staleness=[0, 1])
    assert metrics["rollout/raw_reward"] == 0.75
    assert metrics["rollout/response_len/mean"] == 3.5
    assert metrics["rollout/response_len/max"] == 7
    assert metrics["rollout/truncated_ratio"] == 0.25
    assert metrics["rollout/zero_std/count"] == 1
    assert metrics["rollout/zero_std/count_1"] == 1
    assert metrics["rollout/fully_async/avg_staleness"] == 0.5
    assert metrics["rollout/fully_async/max_staleness"] == 1


def test_nothing_makes_no_metrics() -> None:
    assert batch_metrics([], []) == {}


def test_pass_at_k_equals_counting_all_choices() -> None:
    for samples, correct, k in [(4, 1, 2), (5, 3, 2), (6, 0, 3), (3, 3, 1), (4, 3, 4)]:
        outcomes = [1] * correct + [0] * (samples - correct)
        choices = list(itertools.combinations(outcomes, k))
        expected = sum(any(choice) for choice in choices) / len(choices)
        assert pass_at_k(samples, correct, k) == pytest.approx(expected)
    assert pass_at_ks(1) == []
    assert pass_at_ks(8) == [1, 2, 4, 8]
    assert pass_at_ks(6) == [1, 2, 4]


def test_the_reward_that_counts() -> None:
    assert reward_number(None, None) == 0.0
    assert reward_number(0.5, None) == 0.5
    assert reward_number({"a": 1.0, "b": 2.0}, "b") == 2.0
    with pytest.raises(KeyError, match="set reward_key"):
        reward_number({"a": 1.0}, None)


def test_seeds_differ_by_place_and_are_stable() -> None:
    places = [
        sample_seed(seed, stream, group, index)
        for seed in (0, 1)
        for stream in ("train", "eval/a")
        for group in range(20)
        for index in range(8)
    ]
    assert len(set(places)) == len(places)
    assert all(0 <= seed < 2**63 for seed in places)
    assert sample_seed(42, "train", 0, 0) == 2956597767704899084  # a run must resume with its seeds
