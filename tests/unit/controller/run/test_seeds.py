"""Numbers of an evaluation, and seeds."""

from __future__ import annotations

import itertools

import pytest

from miles.services.controller.run.seeds import sample_seeds
from miles.telemetry.pass_at_k import pass_at_k, pass_at_ks


def test_pass_at_k_equals_counting_all_choices() -> None:
    for samples, correct, k in [(4, 1, 2), (5, 3, 2), (6, 0, 3), (3, 3, 1), (4, 3, 4)]:
        outcomes = [1] * correct + [0] * (samples - correct)
        choices = list(itertools.combinations(outcomes, k))
        expected = sum(any(choice) for choice in choices) / len(choices)
        assert pass_at_k(samples, correct, k) == pytest.approx(expected)
    assert pass_at_ks(1) == []
    assert pass_at_ks(8) == [1, 2, 4, 8]
    assert pass_at_ks(6) == [1, 2, 4]


def test_seeds_differ_by_place_and_are_stable() -> None:
    places = [
        place
        for seed in (0, 1)
        for stream in ("train", "eval/a")
        for group in range(20)
        for place in sample_seeds(seed, stream, group, 8)
    ]
    assert len(set(places)) == len(places)
    assert all(0 <= seed < 2**63 for seed in places)
    assert sample_seeds(42, "train", 0, 1) == [2956597767704899084]  # a run must resume with its seeds
