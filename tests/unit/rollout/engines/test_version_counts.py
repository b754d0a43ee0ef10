from __future__ import annotations

from miles.services.rollout.engines.base import SpeculationCounts
from miles.services.rollout.engines.version_counts import KEPT_PAIRS, VersionCounts
from miles.types import SpeculativeStats


def stats(accepted: int, proposed: int, verified: int) -> SpeculativeStats:
    return SpeculativeStats(accepted_draft_tokens=accepted, proposed_draft_tokens=proposed, verify_count=verified)


def test_counts_are_by_pair_of_versions_and_the_last_pair_is_last() -> None:
    counted = VersionCounts()
    counted.add(2, None, stats(1, 3, 1))
    counted.add(1, None, stats(2, 6, 2))
    counted.add(2, 7, stats(3, 3, 1))
    counted.add(2, None, stats(1, 3, 1))
    counted.add(3, 7, stats(0, 0, 0))
    assert counted.counts == (
        SpeculationCounts(1, None, 2, 6, 2),
        SpeculationCounts(2, 7, 1, 3, 3),
        SpeculationCounts(2, None, 2, 6, 2),
    )


def test_a_policy_that_was_taken_back_far_is_counted() -> None:
    counted = VersionCounts()
    for version in range(30, 30 + KEPT_PAIRS):
        counted.add(version, 0, stats(1, 3, 1))
    for _ in range(500):
        counted.add(20, 0, stats(1, 3, 1))
    assert [count.policy_version for count in counted.counts] == [*range(31, 30 + KEPT_PAIRS), 20]
    assert counted.counts[-1].verify_count == 500


def test_a_pair_that_is_in_use_is_kept() -> None:
    counted = VersionCounts()
    for version in range(KEPT_PAIRS + 3):
        counted.add(version, 0, stats(1, 3, 1))
        counted.add(0, 0, stats(1, 3, 1))
    assert counted.counts[-1] == SpeculationCounts(0, 0, KEPT_PAIRS + 4, 3 * (KEPT_PAIRS + 4), KEPT_PAIRS + 4)
    assert [count.policy_version for count in counted.counts[:-1]] == list(range(4, KEPT_PAIRS + 3))
