"""What an engine counted between two reports."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from miles.rpc.gen import rollout_pb2
from miles.services.controller.speculation.draft_counts import DraftCounts, Versions
from miles.services.controller.speculation.engine_counters import EngineCounters, counts_of

OLD, NEW = Versions(1, 4), Versions(2, 4)
NOTHING = DraftCounts()


def test_each_report_counts_from_the_one_before() -> None:
    counters = EngineCounters()
    assert counters.note("a", {}) == {}
    assert counters.note("a", {OLD: DraftCounts(2, 6, 3)}) == {OLD: DraftCounts(2, 6, 3)}
    reported = {OLD: DraftCounts(3, 9, 3), NEW: DraftCounts(1, 3, 1)}
    assert counters.note("a", reported) == {OLD: DraftCounts(1, 3, 0), NEW: DraftCounts(1, 3, 1)}
    assert counters.note("a", reported) == {}


def test_the_first_report_of_a_process_is_where_counting_begins() -> None:
    counters = EngineCounters()
    assert counters.note("a", {OLD: DraftCounts(100, 300, 200)}) == {}
    assert counters.note("a", {OLD: DraftCounts(101, 303, 200)}) == {OLD: DraftCounts(1, 3, 0)}
    assert counters.note("b", {OLD: DraftCounts(500, 900, 800)}) == {}
    assert counters.note("b", {OLD: DraftCounts(501, 903, 803)}) == {OLD: DraftCounts(1, 3, 3)}


def test_an_engine_that_starts_again_counts_from_zero() -> None:
    counters = EngineCounters()
    counters.note("a", {})
    counters.note("a", {OLD: DraftCounts(9, 27, 20), NEW: DraftCounts(5, 15, 9)})
    assert counters.note("a", {NEW: DraftCounts(2, 6, 5)}) == {NEW: DraftCounts(2, 6, 5)}
    newer = Versions(3, 5)
    assert counters.note("a", {newer: DraftCounts(4, 12, 8)}) == {newer: DraftCounts(4, 12, 8)}


def test_old_pairs_of_versions_may_leave_the_reports() -> None:
    counters = EngineCounters()
    counters.note("a", {})
    counters.note("a", {OLD: DraftCounts(9, 27, 20), NEW: DraftCounts(5, 15, 9)})
    assert counters.note("a", {NEW: DraftCounts(6, 18, 9)}) == {NEW: DraftCounts(1, 3, 0)}


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=4), max_size=8))
def test_what_is_returned_adds_up_to_what_was_counted(reports: list[list[tuple[int, int]]]) -> None:
    counters, seen, added = EngineCounters(), dict[Versions, DraftCounts](), NOTHING
    counters.note("a", {})
    for report in reports:
        for policy, accepted in sorted(report):
            versions = Versions(policy, None)
            counted = DraftCounts(1, 5, accepted)
            seen[versions] = seen.get(versions, NOTHING) + counted
        added = sum(counters.note("a", seen).values(), added)
    assert added == sum(seen.values(), NOTHING)


def test_a_report_is_read_by_pair_of_versions() -> None:
    message = rollout_pb2.SpeculationProgress(
        counts=[DraftCounts(1, 2, 1).to_proto(Versions(3, None)), DraftCounts(4, 9, 2).to_proto(Versions(3, 0))]
    )
    assert counts_of(message) == {Versions(3, None): DraftCounts(1, 2, 1), Versions(3, 0): DraftCounts(4, 9, 2)}
