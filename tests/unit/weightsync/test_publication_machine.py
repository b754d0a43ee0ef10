"""The publication state machine under random interleavings of trainer, controller, engines, failures and restarts."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from miles.services.weightsync import snapshot
from miles.services.weightsync.actions import Action, Disconnect, Ended, Free, Send
from miles.services.weightsync.engine import Order, OrderKind
from miles.services.weightsync.publication import Publication
from miles.services.weightsync.timing import Now, PublicationLimits
from miles.services.weightsync.version import Refused

LIMITS = PublicationLimits(load_deadline_s=20.0, first_retry_s=5.0, last_retry_s=40.0)
ENGINES = ("a", "b", "c")


@dataclasses.dataclass
class FakeEngine:
    """What is true of an engine, whatever the machine believes."""

    session: int | None = None
    orders: list[Order] = dataclasses.field(default_factory=list)
    serves: int | None = None
    prefetched: int | None = None
    maps: set[int] = dataclasses.field(default_factory=set)
    refused: set[int] = dataclasses.field(default_factory=set)
    """In this session."""
    told_to_stop: bool = False
    stopped_by: int = 0
    last_order_id: int = 0


class Interleavings(RuleBasedStateMachine):
    """Drives one stream and checks what is promised after every event."""

    @initialize()
    def begin(self) -> None:
        self.machine = Publication(LIMITS)
        self.time_s = 100.0
        self.engines = {name: FakeEngine() for name in ENGINES}
        self.sessions = 0
        self.checksums: dict[int, bytes] = {}
        self.numbers: dict[int, int] = {}
        self.corrupt: set[int] = set()
        self.freed: set[int] = set()
        self.open: dict[str, tuple[float, int]] = {}
        self.ended: set[str] = set()
        self.operations = 0
        self.allocated: int | None = None
        self.number = 0

    # -- events -------------------------------------------------------------------------------------------------------

    @rule(step=st.sampled_from([1, 1, 0, -1]))
    def allocate(self, step: int) -> None:
        self.number = max(0, self.number + step)
        version, actions = self.machine.allocate(self.number, 64, self.now())
        self.allocated = version.publication_id
        self.numbers[version.publication_id] = self.number
        self.carry_out(actions)

    @precondition(lambda self: self.allocated is not None)
    @rule(corrupt=st.booleans(), twice=st.booleans())
    def prepare(self, corrupt: bool, twice: bool) -> None:
        assert self.allocated is not None
        publication_id, self.allocated = self.allocated, None
        checksum = publication_id.to_bytes(16, "big")
        self.checksums[publication_id] = checksum
        if corrupt:
            self.corrupt.add(publication_id)
        self.carry_out(self.machine.prepare(publication_id, checksum, self.now()))
        if twice:
            assert self.machine.prepare(publication_id, checksum, self.now()) == []
            with pytest.raises(Refused):
                self.machine.prepare(publication_id, b"other", self.now())

    @precondition(lambda self: self.checksums)
    @rule(
        min_engines=st.integers(0, 3), check=st.booleans(), back=st.integers(0, 1), deadline_s=st.sampled_from([4, 30])
    )
    def activate(self, min_engines: int, check: bool, back: int, deadline_s: int) -> None:
        number = max(0, self.number - back)
        self.operations += 1
        name = f"operation {self.operations}"
        try:
            wanted = self.machine.find(number).publication_id
        except Refused:
            return
        joins = self.machine.activation is not None and self.machine.activation.publication_id == wanted
        if joins:
            assert self.machine.activation is not None
            self.open[name] = (self.machine.activation.deadline_s, self.machine.activation.min_engines)
        else:
            self.open[name] = (self.time_s + deadline_s, min_engines)
        self.carry_out(self.machine.activate(number, name, deadline_s, min_engines, check, self.now()))
        assert self.machine.activate(number, name, deadline_s, min_engines, check, self.now()) == []

    @rule(name=st.sampled_from(ENGINES), fresh=st.booleans())
    def connect(self, name: str, fresh: bool) -> None:
        engine = self.engines[name]
        if fresh:
            self.engines[name] = engine = FakeEngine(session=engine.session)
        self.sessions += 1
        engine.orders, engine.last_order_id, engine.stopped_by, engine.refused = [], 0, 0, set()
        engine.session = self.sessions
        engine.prefetched = None  # whatever it is, no order of this session swaps it in before it prefetches again
        held = None if engine.told_to_stop else engine.serves
        number = None if held is None else self.numbers[held]
        checksum = b"" if held is None else self.checksums[held]
        self.carry_out(self.machine.connect(name, self.sessions, number, checksum, self.now()))

    @rule(name=st.sampled_from(ENGINES))
    def disconnect(self, name: str) -> None:
        engine = self.engines[name]
        if engine.session is not None:
            session, engine.session, engine.orders = engine.session, None, []
            self.carry_out(self.machine.disconnect(name, session, self.now()))

    @rule(
        name=st.sampled_from(ENGINES),
        fails=st.sampled_from([False, False, False, True]),
        refuses=st.sampled_from([False, False, True]),
    )
    def answer(self, name: str, fails: bool, refuses: bool) -> None:
        engine = self.engines[name]
        if engine.session is None or not engine.orders:
            return
        order = engine.orders.pop(0)
        believed = self.machine.engines[name].in_flight
        if order.publication_id in self.freed:
            assert believed is not None, "an order must be open"
            assert believed.expired, "told to use bytes that are gone"
            fails = True
        error = self.execute(engine, order, fails)
        refuses = refuses and error is not None and order.kind in (OrderKind.PREFETCH, OrderKind.SWAP)
        if refuses:
            engine.refused.add(order.publication_id)
        self.carry_out(self.machine.report(name, engine.session, order.order_id, error, 0.1, 0.01, self.now(), refuses))
        assert self.machine.report(name, engine.session, order.order_id, None, 0.1, 0.01, self.now()) == []

    @rule(name=st.sampled_from(ENGINES), order_id=st.integers(0, 50), session=st.integers(0, 50))
    def stray_report(self, name: str, order_id: int, session: int) -> None:
        if session != self.engines[name].session:
            assert self.machine.report(name, session, order_id, None, 0.0, 0.0, self.now()) == []

    @rule(seconds=st.sampled_from([0.5, 3.0, 11.0, 50.0]))
    def wait(self, seconds: float) -> None:
        end = self.time_s + seconds
        while (wake := self.machine.wake_at_s()) is not None and wake <= end:
            assert wake > self.time_s, "a wake-up that changes nothing would spin"
            self.time_s = wake
            self.carry_out(self.machine.tick(self.now()))
        self.time_s = end
        self.carry_out(self.machine.tick(self.now()))

    @rule()
    def restart_the_service(self) -> None:
        saved = json.loads(json.dumps(snapshot.save(self.machine)))
        self.machine = snapshot.load(saved, self.now(), LIMITS)
        self.open.clear()
        for engine in self.engines.values():
            engine.session, engine.orders = None, []

    @rule(step=st.sampled_from([1, 1, 0]))
    def publish_smoothly(self, step: int) -> None:
        """What a run is made of: gets the rest of the rules into interesting places sooner."""
        self.allocate(step)
        self.prepare(corrupt=False, twice=False)
        self.activate(min_engines=1, check=False, back=0, deadline_s=30)
        self.everybody_answers()

    @rule()
    def everybody_answers(self) -> None:
        for name in ENGINES:
            while self.engines[name].orders and self.engines[name].session is not None:
                self.answer(name, fails=False, refuses=False)

    # -- the world ----------------------------------------------------------------------------------------------------

    def now(self) -> Now:
        return Now(self.time_s, int(self.time_s * 1e9))

    def execute(self, engine: FakeEngine, order: Order, fails: bool) -> str | None:
        """What a real engine would do; returns the error it reports."""
        publication_id = order.publication_id
        if order.kind is OrderKind.PREFETCH:
            engine.prefetched = None
            fails = fails or publication_id in self.corrupt
            if not fails:
                engine.prefetched = publication_id
                engine.maps.add(publication_id)
        elif order.kind is OrderKind.SWAP:
            assert engine.prefetched == publication_id, "told to swap to what it has not verified"
            engine.prefetched = None
            engine.serves = None if fails else publication_id
            if not fails and order.order_id > engine.stopped_by:
                engine.told_to_stop = False
        elif order.kind is OrderKind.DISCARD:
            assert publication_id != engine.serves, "ordered to discard what it serves"
            engine.prefetched = None if engine.prefetched == publication_id else engine.prefetched
            if not fails:
                engine.maps.discard(publication_id)
        if fails and order.kind is not OrderKind.DISCARD:
            engine.told_to_stop = True  # its own rule: a failed order quarantines
            return "failed"
        return "still mapped" if fails else None

    def carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self.receive(action)
            elif isinstance(action, Free):
                self.free(action)
            elif isinstance(action, Ended):
                self.finish(action)
            elif isinstance(action, Disconnect):
                assert action.session != self.engines[action.engine_id].session

    def receive(self, action: Send) -> None:
        engine, order = self.engines[action.engine_id], action.order
        assert engine.session == action.session
        assert order.order_id > engine.last_order_id, "order ids must ascend"
        engine.last_order_id = order.order_id
        if order.kind is OrderKind.QUARANTINE:
            engine.told_to_stop, engine.stopped_by = True, order.order_id
            return
        assert not engine.orders, "one order at a time"
        believed = self.machine.engines.get(action.engine_id)
        if engine.told_to_stop or (believed is not None and believed.quarantined):
            assert order.kind in (OrderKind.PREFETCH, OrderKind.SWAP), "a quarantined engine gets only a full load"
        assert order.publication_id not in engine.refused, "ordered again to load what it refused"
        activation = self.machine.activation
        if order.kind is OrderKind.SWAP and activation is not None:
            ready = [n for n, e in self.engines.items() if order.publication_id in (e.prefetched, e.serves)]
            assert activation.waited_for <= set(ready), "a swap before everybody waited for has the bytes"
            required = self.required(order.publication_id, activation.min_engines)
            assert len(ready) >= required or activation.swapping
        engine.orders.append(order)

    def free(self, action: Free) -> None:
        publication_id = action.publication_id
        assert publication_id not in self.freed
        self.freed.add(publication_id)
        assert publication_id not in (self.machine.active, self.machine.target)
        for name, engine in self.engines.items():
            if action.reusable:
                assert publication_id not in engine.maps, f"{name} would see its weights rewritten"
            if engine.session is not None and not engine.told_to_stop:
                assert publication_id not in (engine.serves, engine.prefetched), f"{name} needs what was freed"

    def finish(self, action: Ended) -> None:
        for name in action.operation_ids:
            deadline_s, min_engines = self.open.pop(name)
            assert name not in self.ended
            self.ended.add(name)
            assert self.time_s <= deadline_s, "an activation ended after its deadline"
            if action.outcome.ok:
                published = action.outcome.publication_id
                serving = [
                    e for e in self.engines.values() if e.session and not e.told_to_stop and e.serves == published
                ]
                assert len(serving) >= self.required(published, min_engines)
                assert action.outcome.engines == len(serving)
                assert self.machine.active == published
            if action.outcome.refused:
                refused = action.outcome.publication_id
                assert not action.outcome.ok
                assert any(refused in engine.refused for engine in self.engines.values())
                willing = [e for e in self.engines.values() if e.session and refused not in e.refused]
                assert not willing, "failed for good, with an engine left that could serve"

    def required(self, publication_id: int, min_engines: int) -> int:
        """Engines that must serve a version: those that refuse it are left out, as long as there is another one."""
        if not any(publication_id in engine.refused for engine in self.engines.values()):
            return min_engines
        willing = [e for e in self.engines.values() if e.session and publication_id not in e.refused]
        return min(min_engines, max(1, len(willing)))

    # -- promises -----------------------------------------------------------------------------------------------------

    @invariant()
    def what_the_machine_believes_is_true(self) -> None:
        for name, believed in self.machine.engines.items():
            engine = self.engines[name]
            assert believed.session == engine.session
            if believed.session is not None and believed.held is not None:
                assert believed.held == engine.serves
                assert not engine.told_to_stop

    @invariant()
    def no_activation_outlives_its_deadline(self) -> None:
        for deadline_s, _ in self.open.values():
            assert self.time_s < deadline_s

    @invariant()
    def the_active_version_has_its_bytes(self) -> None:
        if self.machine.active is not None:
            assert self.machine.active in self.machine.versions
            assert self.machine.active not in self.freed

    def teardown(self) -> None:
        """With everybody answering, every connected engine ends up with the active version and the rest is freed."""
        if not hasattr(self, "machine"):
            return
        for _ in range(40):
            self.everybody_answers()
            self.wait(11.0)
        active = self.machine.active
        assert self.machine.activation is None
        if active is not None and active not in self.corrupt:
            for engine in self.engines.values():
                serves = engine.serves == active and not engine.told_to_stop
                assert engine.session is None or serves or active in engine.refused
            newer = [p for p in self.machine.versions if p < active]
            assert newer == [], "older versions must be freed once everybody has moved on"


def test_bytes_that_an_earlier_session_prefetched_may_be_freed() -> None:
    state = Interleavings()
    state.begin()
    state.publish_smoothly(step=1)
    state.restart_the_service()
    state.activate(back=0, check=False, deadline_s=4, min_engines=2)
    state.connect(fresh=False, name="a")
    state.everybody_answers()
    state.wait(seconds=11.0)
    state.connect(fresh=False, name="a")
    state.publish_smoothly(step=1)
    assert 1 in state.freed
    state.teardown()


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
