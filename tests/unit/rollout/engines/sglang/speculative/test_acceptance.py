from __future__ import annotations

from miles.services.rollout.engines.base import SpeculationCounts
from miles.services.rollout.engines.sglang.speculative.acceptance import KEPT_PAIRS, Acceptance, RequestCounters
from miles.types import SpeculativeStats


def stats(accepted: int, proposed: int, verified: int) -> SpeculativeStats:
    return SpeculativeStats(accepted_draft_tokens=accepted, proposed_draft_tokens=proposed, verify_count=verified)


def test_each_event_counts_what_is_new_in_it() -> None:
    counters = RequestCounters()
    events = [stats(4, 9, 3), None, stats(4, 9, 3), stats(10, 21, 7)]
    assert [counters.new(event) for event in events] == [
        stats(4, 9, 3),
        stats(0, 0, 0),
        stats(0, 0, 0),
        stats(6, 12, 4),
    ]


def test_a_request_that_goes_on_elsewhere_begins_at_nothing() -> None:
    assert RequestCounters().new(stats(2, 6, 2)) == stats(2, 6, 2)


def test_counts_are_by_pair_of_versions_and_oldest_first() -> None:
    acceptance = Acceptance()
    acceptance.add(2, None, stats(1, 3, 1))
    acceptance.add(1, None, stats(2, 6, 2))
    acceptance.add(2, 7, stats(3, 3, 1))
    acceptance.add(2, None, stats(1, 3, 1))
    acceptance.add(3, 7, stats(0, 0, 0))
    assert acceptance.counts == (
        SpeculationCounts(1, None, 2, 6, 2),
        SpeculationCounts(2, None, 2, 6, 2),
        SpeculationCounts(2, 7, 1, 3, 3),
    )


def test_the_newest_pairs_are_kept_whatever_comes_late() -> None:
    acceptance = Acceptance()
    for version in range(KEPT_PAIRS + 3):
        acceptance.add(version, 0, stats(1, 3, 1))
    acceptance.add(0, 0, stats(1, 3, 1))
    assert [count.policy_version for count in acceptance.counts] == list(range(3, KEPT_PAIRS + 3))
