"""The admission rules by tables."""

from __future__ import annotations

import pytest

from miles.services.controller.run.admission import Admission
from miles.services.controller.run.group_leases import GroupLease


def lease_all(admission: Admission, worker: str = "w") -> list[int]:
    leased = []
    while (lease := admission.lease(worker)) is not None:
        leased.append(lease[0])
    return leased


def train(admission: Admission) -> tuple[int, ...]:
    batch = admission.begin_step()
    assert batch is not None
    admission.finish_step(batch)
    return batch.group_ids


@pytest.mark.parametrize(("max_staleness", "admitted"), [(0, 4), (1, 8), (3, 16)])
def test_admits_up_to_the_staleness_bound(max_staleness: int, admitted: int) -> None:
    admission = Admission(batch_size=4, max_staleness=max_staleness, total_groups=100)
    assert lease_all(admission) == list(range(admitted))


def test_a_window_holds_fewer_groups_than_the_staleness_bound_allows() -> None:
    admission = Admission(batch_size=4, max_staleness=1, total_groups=100, window=6)
    assert lease_all(admission) == [0, 1, 2, 3, 4, 5]
    for group_id in (5, 4, 3, 2):
        admission.accept(group_id, 1, 0)
    assert train(admission) == (2, 3, 4, 5)
    assert lease_all(admission) == [6, 7]
    admission.activate(1)
    assert lease_all(admission) == [8, 9]


def test_a_new_version_admits_one_more_batch() -> None:
    admission = Admission(batch_size=2, max_staleness=0, total_groups=100)
    lease_all(admission)
    for group_id in (1, 0):
        assert admission.accept(group_id, 1, oldest_version=0)
    assert admission.lease("w") is None
    assert train(admission) == (0, 1)
    assert admission.lease("w") is None
    admission.activate(1)
    assert lease_all(admission) == [2, 3]


def test_never_admits_more_than_the_job_trains_on() -> None:
    admission = Admission(batch_size=2, max_staleness=5, total_groups=4)
    assert lease_all(admission) == [0, 1, 2, 3]


def test_a_synchronous_step_waits_for_its_straggler() -> None:
    admission = Admission(batch_size=2, max_staleness=0, total_groups=100)
    lease_all(admission)
    admission.accept(1, 1, oldest_version=0)
    assert admission.begin_step() is None
    admission.accept(0, 1, oldest_version=0)
    assert train(admission) == (0, 1)


def test_finished_groups_overtake_a_straggler_until_its_deadline() -> None:
    admission = Admission(batch_size=2, max_staleness=2, total_groups=100)
    assert lease_all(admission) == [0, 1, 2, 3, 4, 5]
    for group_id in (1, 2, 3, 4, 5):
        admission.accept(group_id, 1, oldest_version=0)
    assert train(admission) == (1, 2)
    assert train(admission) == (3, 4)
    admission.activate(2)
    for group_id in lease_all(admission):
        admission.accept(group_id, 1, oldest_version=2)
    assert admission.begin_step() is None, "group 0 was begun at version 0 and must be in step 2"
    admission.accept(0, 1, oldest_version=0)
    batch = admission.begin_step()
    assert batch is not None
    assert (batch.group_ids, batch.staleness) == ((0, 5), (2, 2))


def test_several_stragglers_are_not_left_behind_when_they_would_not_fit_into_the_steps_left() -> None:
    admission = Admission(batch_size=2, max_staleness=1, total_groups=100)
    lease_all(admission)
    admission.accept(3, 1, 0)
    admission.accept(2, 1, 0)
    assert train(admission) == (2, 3), "0 and 1 fit into step 1"
    admission.activate(1)
    assert lease_all(admission) == [4, 5]
    for group_id in (4, 5, 0):
        admission.accept(group_id, 1, 1 if group_id else 0)
    assert admission.begin_step() is None


def test_a_dropped_group_is_replaced_and_accounted_for_once() -> None:
    admission = Admission(batch_size=2, max_staleness=0, total_groups=2)
    lease_all(admission)
    assert admission.drop(0, 1)
    assert lease_all(admission) == [2]
    admission.accept(1, 1, 0)
    admission.accept(2, 1, 0)
    batch = admission.begin_step()
    assert batch is not None
    assert (batch.group_ids, batch.dropped) == ((1, 2), (0,))
    admission.finish_step(batch)
    assert admission.dropped == set()


def test_a_group_dropped_during_a_step_is_accounted_for_by_the_next() -> None:
    admission = Admission(batch_size=1, max_staleness=2, total_groups=9)
    lease_all(admission)
    admission.accept(0, 1, 0)
    batch = admission.begin_step()
    assert batch is not None
    admission.drop(1, 1)
    admission.finish_step(batch)
    assert admission.dropped == {1}


def test_a_lost_workers_groups_are_leased_again_first_and_its_late_results_refused() -> None:
    admission = Admission(batch_size=3, max_staleness=0, total_groups=100)
    assert admission.lease("a") == (0, 1)
    assert admission.lease("b") == (1, 1)
    assert admission.lose_worker("a") == [0]
    assert admission.lease("b") == (0, 2)
    assert not admission.accept(0, 1, oldest_version=0)
    assert admission.accept(0, 2, oldest_version=0)
    assert not admission.accept(0, 2, oldest_version=0)


def test_attempts_of_a_later_life_are_higher() -> None:
    admission = Admission(batch_size=1, max_staleness=0, total_groups=9, first_attempt=65537)
    assert admission.lease("a") == (0, 65537)
    admission.requeue(0, 65537)
    assert admission.lease("a") == (0, 65538)


def test_resume_begins_what_was_lost_and_nothing_that_is_queued_or_dropped() -> None:
    admission = Admission.resume(
        batch_size=2,
        max_staleness=0,
        total_groups=100,
        version=3,
        consumed_below=6,
        consumed_ids=[7],
        ready={4: 2, 6: 3, 9: 3},
        dropped=[5, 10],
    )
    assert admission.ready == {6: 3, 9: 3}
    assert admission.pending == {8}
    assert admission.dropped == {10}
    assert admission.next_id == 11
    assert admission.consumed == 6


def test_resume_leaves_groups_with_live_workers_where_they_are() -> None:
    admission = Admission.resume(
        batch_size=2,
        max_staleness=1,
        total_groups=100,
        version=1,
        consumed_below=2,
        consumed_ids=[],
        ready={3: 1},
        leases={1: GroupLease("a", 1), 2: GroupLease("a", 7), 3: GroupLease("b", 1), 5: GroupLease("b", 2)},
        first_attempt=100,
    )
    assert admission.leases == {2: GroupLease("a", 7), 5: GroupLease("b", 2)}
    assert admission.pending == {4}
    assert lease_all(admission) == [4]
    assert admission.accept(2, 7, oldest_version=0)
    assert admission.lose_worker("b") == [5]
    assert admission.lease("c") == (5, 3)


def test_resume_causes_no_burst() -> None:
    admission = Admission.resume(
        batch_size=2,
        max_staleness=1,
        total_groups=100,
        version=1,
        consumed_below=2,
        consumed_ids=[],
        ready={2: 0, 3: 0, 4: 1},
    )
    assert lease_all(admission) == [5]


def test_a_lost_group_waits_for_the_version_it_would_have_had() -> None:
    """The trainer is back at version 1; group 5 belonged to step 2 and was not finished."""
    admission = Admission.resume(
        batch_size=2,
        max_staleness=0,
        total_groups=100,
        version=1,
        consumed_below=2,
        consumed_ids=[],
        ready={2: 1, 3: 1, 4: 2, 6: 3},
    )
    assert lease_all(admission) == []
    assert train(admission) == (2, 3)
    admission.activate(2)
    assert lease_all(admission) == [5]
    admission.accept(5, 1, 2)
    assert train(admission) == (4, 5)


def test_a_smaller_bound_after_a_resume_does_not_block_what_is_finished() -> None:
    admission = Admission.resume(
        batch_size=2,
        max_staleness=0,
        total_groups=100,
        version=4,
        consumed_below=8,
        consumed_ids=[],
        ready=dict.fromkeys(range(8, 16), 1),
    )
    assert train(admission) == (8, 9)
