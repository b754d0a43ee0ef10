"""The admission rule by tables, and its promises under random interleavings."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from miles.services.controller.admission import Admission


def lease_all(admission: Admission, worker: str = "w") -> list[int]:
    leased = []
    while (lease := admission.lease(worker)) is not None:
        leased.append(lease[0])
    return leased


@pytest.mark.parametrize(("max_staleness", "admitted"), [(0, 4), (1, 8), (3, 16)])
def test_admits_up_to_the_staleness_bound(max_staleness: int, admitted: int) -> None:
    admission = Admission(batch_size=4, max_staleness=max_staleness, total_groups=100)
    assert lease_all(admission) == list(range(admitted))


def test_a_new_version_admits_one_more_batch() -> None:
    admission = Admission(batch_size=2, max_staleness=0, total_groups=100)
    lease_all(admission)
    for group_id in (1, 0):
        assert admission.accept(group_id, 1, oldest_version=0)
    assert admission.lease("w") is None
    batch = admission.next_batch()
    assert batch == [0, 1]
    admission.train(batch)
    assert admission.lease("w") is None
    admission.activate(1)
    assert lease_all(admission) == [2, 3]


def test_never_admits_more_than_the_job_trains_on() -> None:
    admission = Admission(batch_size=2, max_staleness=5, total_groups=4)
    assert lease_all(admission) == [0, 1, 2, 3]


def test_a_batch_waits_for_a_straggler_with_a_smaller_id() -> None:
    admission = Admission(batch_size=2, max_staleness=1, total_groups=100)
    lease_all(admission)
    for group_id in (1, 2, 3):
        admission.accept(group_id, 1, oldest_version=0)
    assert admission.next_batch() is None
    admission.accept(0, 1, oldest_version=0)
    assert admission.next_batch() == [0, 1]


def test_a_dropped_group_is_replaced_and_accounted_for_once() -> None:
    admission = Admission(batch_size=2, max_staleness=0, total_groups=2)
    lease_all(admission)
    assert admission.drop(0, 1)
    assert lease_all(admission) == [2]
    admission.accept(1, 1, 0)
    admission.accept(2, 1, 0)
    assert admission.train(admission.next_batch() or []) == {0}
    assert admission.dropped == set()


def test_a_lost_workers_groups_are_leased_again_first_and_its_late_results_refused() -> None:
    admission = Admission(batch_size=3, max_staleness=0, total_groups=100)
    assert admission.lease("a") == (0, 1)
    assert admission.lease("b") == (1, 1)
    assert admission.lose_worker("a") == [0]
    assert admission.lease("b") == (0, 2)
    assert not admission.accept(0, 1, oldest_version=0)
    assert admission.accept(0, 2, oldest_version=0)
    assert not admission.accept(0, 2, oldest_version=0)


def test_resume_admits_what_was_lost_and_nothing_that_is_queued() -> None:
    admission = Admission.resume(
        batch_size=2,
        max_staleness=0,
        total_groups=100,
        version=3,
        consumed_below=6,
        consumed_ids=[7],
        ready={4: 2, 6: 3, 9: 3},
    )
    assert admission.ready == {6: 3, 9: 3}
    assert admission.pending == {8}
    assert admission.next_id == 10
    assert admission.consumed == 6


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


class Interleavings(RuleBasedStateMachine):
    """Workers lease, finish, fail and die; the trainer trains whenever it may."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[int] = []
        self.all_dropped: set[int] = set()
        self.born: dict[int, int] = {}

    @initialize(batch_size=st.integers(1, 3), max_staleness=st.integers(0, 3), steps=st.integers(1, 6))
    def begin(self, batch_size: int, max_staleness: int, steps: int) -> None:
        self.admission = Admission(batch_size=batch_size, max_staleness=max_staleness, total_groups=batch_size * steps)

    @rule(worker=st.sampled_from("abc"))
    def lease(self, worker: str) -> None:
        lease = self.admission.lease(worker)
        if lease is not None:
            self.born.setdefault(lease[0], self.admission.version)

    @precondition(lambda self: self.admission.leases)
    @rule(data=st.data(), what=st.sampled_from(["accept", "accept", "accept", "drop", "give_back"]))
    def end_a_lease(self, data: st.DataObject, what: str) -> None:
        group_id = data.draw(st.sampled_from(sorted(self.admission.leases)))
        attempt = self.admission.leases[group_id].attempt
        if what == "accept":
            assert self.admission.accept(group_id, attempt, self.born[group_id])
        elif what == "drop":
            assert self.admission.drop(group_id, attempt)
            self.all_dropped.add(group_id)
        else:
            assert self.admission.give_back(group_id, attempt)
        assert not self.admission.accept(group_id, attempt, 0)

    @rule(worker=st.sampled_from("abc"))
    def lose_worker(self, worker: str) -> None:
        self.admission.lose_worker(worker)

    @rule()
    def train(self) -> None:
        batch = self.admission.next_batch()
        if batch is None:
            return
        assert max(self.admission.staleness(batch)) <= self.admission.max_staleness
        self.admission.train(batch)
        self.trained += batch
        self.admission.activate(self.admission.version + 1)

    @rule()
    def restart(self) -> None:
        """Controller and trainer come back at a checkpoint that covers everything trained so far."""
        done = set(self.trained) | self.all_dropped
        self.admission = Admission.resume(
            batch_size=self.admission.batch_size,
            max_staleness=self.admission.max_staleness,
            total_groups=self.admission.total_groups,
            version=self.admission.version,
            consumed_below=0,
            consumed_ids=done,
            ready=self.admission.ready,
        )
        for group_id in self.admission.pending:
            self.born[group_id] = self.admission.version

    @invariant()
    def no_group_is_lost_or_trained_twice(self) -> None:
        if not hasattr(self, "admission"):
            return
        assert len(self.trained) == len(set(self.trained))
        places = [self.admission.pending, self.admission.leases.keys(), self.admission.ready.keys()]
        everywhere = [group_id for place in places for group_id in place]
        assert len(everywhere) == len(set(everywhere))
        known = set(everywhere) | set(self.trained) | self.all_dropped
        assert known == set(range(self.admission.next_id))

    def teardown(self) -> None:
        """Whatever happened, finishing every lease finishes the job."""
        if not hasattr(self, "admission"):
            return
        for _ in range(10_000):
            if self.admission.consumed == self.admission.total_groups:
                return
            leased = self.admission.lease("z")
            if leased is not None:
                self.born.setdefault(leased[0], self.admission.version)
            for group_id, lease in list(self.admission.leases.items()):
                self.admission.accept(group_id, lease.attempt, self.born[group_id])
            self.train()
        raise AssertionError(f"the job never ends: {self.admission}")


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
