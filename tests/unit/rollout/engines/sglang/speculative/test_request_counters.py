from __future__ import annotations

from miles.services.rollout.engines.sglang.speculative.request_counters import RequestCounters
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
