from __future__ import annotations

import itertools
from typing import Any

import pytest

from miles.services.rollout.engines.sglang.speculative.adaptive import VERIFIED_TOKENS, adaptive_config


def steps(config: dict[str, Any]) -> dict[int, list[int]]:
    return {int(start): tier["candidate_steps"] for start, tier in config.items() if start.isdigit()}


@pytest.mark.parametrize("most", [1, 2, 3, 5, 8])
def test_the_bound_is_a_candidate_and_none_is_above_it(most: int) -> None:
    tiers = steps(adaptive_config(most))
    assert tiers[1][-1] == most
    assert max(max(each) for each in tiers.values()) == most
    assert all(each == sorted(set(each)) and each[0] == 0 for each in tiers.values())
    assert len(set().union(*tiers.values())) <= 6, "each number of steps has CUDA graphs of its own"


def test_large_batches_verify_no_more_than_costs_next_to_nothing() -> None:
    tiers = steps(adaptive_config(7))
    starts = sorted(tiers)
    for start, end in itertools.pairwise(starts[1:]):
        assert end * (tiers[start][-1] + 1) <= VERIFIED_TOKENS
    assert tiers[128] == [0]
    assert tiers[64] == [0, 1]


def test_rejection_sampling_never_ends_drafts() -> None:
    tiers = steps(adaptive_config(3, may_end=False))
    assert tiers == {1: [1, 3], 8: [1, 3], 32: [1, 3], 64: [1], 128: [1]}
