"""Leases of workers under random interleavings: one live number a worker, never given twice, silence ends it."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from miles.services.controller.workers.worker_leases import WorkerLeases

TTL_S = 5.0
WORKERS = st.sampled_from("abc")
INCARNATIONS = st.sampled_from(["first", "second"])


class Leases(RuleBasedStateMachine):
    """A table beside what it should say."""

    def __init__(self) -> None:
        super().__init__()
        self.table = WorkerLeases(TTL_S, first_number=10)
        self.now_s = 0.0
        self.live: dict[str, tuple[int, str, float]] = {}
        """Number, incarnation and end of each lease that was not given back or told to have expired."""
        self.given: list[tuple[int, str, str]] = []
        """Every number with its worker and incarnation."""

    @rule(seconds=st.floats(0, 6))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(worker=WORKERS, incarnation=INCARNATIONS)
    def register(self, worker: str, incarnation: str) -> None:
        number = self.table.register(worker, incarnation, self.now_s).number
        known = self.live.get(worker)
        if known is not None and known[1] == incarnation and known[2] > self.now_s:
            assert number == known[0]
        else:
            assert all(number > earlier for earlier, _, _ in self.given)
            self.given.append((number, worker, incarnation))
        self.live[worker] = (number, incarnation, self.now_s + TTL_S)

    @rule(data=st.data(), worker=WORKERS)
    def renew(self, data: st.DataObject, worker: str) -> None:
        number = data.draw(st.sampled_from([9, *(number for number, _, _ in self.given)]))
        known = self.live.get(worker)
        right = known is not None and known[0] == number and known[2] > self.now_s
        assert self.table.renew(worker, number, self.now_s) == right
        if known is not None and right:
            self.live[worker] = (known[0], known[1], self.now_s + TTL_S)

    @rule(data=st.data(), worker=WORKERS)
    def release(self, data: st.DataObject, worker: str) -> None:
        number = data.draw(st.sampled_from([9, *(number for number, _, _ in self.given)]))
        right = worker in self.live and self.live[worker][0] == number
        assert self.table.release(worker, number) == right
        if right:
            del self.live[worker]

    @rule()
    def expire(self) -> None:
        gone = {worker for worker, (_, _, end_s) in self.live.items() if end_s <= self.now_s}
        assert {lease.worker_id for lease in self.table.expire(self.now_s)} == gone
        for worker in gone:
            del self.live[worker]

    @invariant()
    def it_agrees(self) -> None:
        found = {lease.worker_id: (lease.number, lease.incarnation, lease.expires_s) for lease in self.table}
        assert found == self.live


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
