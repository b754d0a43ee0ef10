"""The publication state machine, one promise per test."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from miles.services.weightsync import snapshot
from miles.services.weightsync.actions import Action, Disconnect, Ended, Free, Outcome, Send
from miles.services.weightsync.engine import EngineState, Order, OrderKind
from miles.services.weightsync.publication import Publication
from miles.services.weightsync.timing import Now, PublicationLimits
from miles.services.weightsync.version import Refused, UnknownVersion, VersionState

PREFETCH, SWAP, CHECK, DISCARD, QUARANTINE = (
    OrderKind.PREFETCH,
    OrderKind.SWAP,
    OrderKind.CHECK,
    OrderKind.DISCARD,
    OrderKind.QUARANTINE,
)


@dataclasses.dataclass
class Scene:
    """A machine, a clock, and what the machine asked for that has not been looked at yet."""

    machine: Publication = dataclasses.field(
        default_factory=lambda: Publication(PublicationLimits(load_deadline_s=20, first_retry_s=5, last_retry_s=40))
    )
    time_s: float = 0.0
    actions: list[Action] = dataclasses.field(default_factory=list)
    sessions: int = 0

    def now(self) -> Now:
        return Now(self.time_s, int(self.time_s * 1e9))

    def publish(self, number: int, out_of_reach: Sequence[str] = ()) -> int:
        """Allocate and prepare; returns the publication id."""
        version, actions = self.machine.allocate(number, 64, self.now())
        publication_id = version.publication_id
        self.actions += actions
        self.actions += self.machine.prepare(publication_id, b"c%d" % publication_id, self.now(), out_of_reach)
        return publication_id

    def connect(
        self, name: str, number: int | None = None, checksum: bytes = b"", out_of_reach: Sequence[int] = ()
    ) -> None:
        self.sessions += 1
        self.actions += self.machine.connect(name, self.sessions, number, checksum, self.now(), out_of_reach)

    def disconnect(self, name: str) -> None:
        session = self.machine.engines[name].session
        assert session is not None
        self.actions += self.machine.disconnect(name, session, self.now())

    def activate(
        self, number: int, operation: str = "op", deadline_s: float = 10, min_engines: int = 1, check: bool = False
    ) -> None:
        self.actions += self.machine.activate(number, operation, deadline_s, min_engines, check, self.now())

    def answer(self, name: str, error: str | None = None, *, refused: bool = False) -> Order:
        """The engine answers its open order; returns that order."""
        engine = self.machine.engines[name]
        assert engine.in_flight is not None, f"{name} has nothing to answer"
        assert engine.session is not None
        order = engine.in_flight.order
        self.actions += self.machine.report(name, engine.session, order.order_id, error, 0.5, 0.25, self.now(), refused)
        return order

    def refuse(self, *names: str, at: OrderKind = OrderKind.SWAP) -> None:
        """These engines answer until they get an order of this kind, which they refuse."""
        while before := [name for name in names if self.open(name) not in (at, None)]:
            self.answer(before[0])
        for name in names:
            self.answer(name, "lm_head.weight is missing", refused=True)

    def finish_orders(self, *names: str) -> None:
        """These engines answer until nothing is left to answer."""
        while busy := [name for name in names if self.machine.engines[name].in_flight is not None]:
            self.answer(busy[0])

    def wait(self, seconds: float) -> None:
        self.time_s += seconds
        self.actions += self.machine.tick(self.now())

    def open(self, name: str) -> OrderKind | None:
        flight = self.machine.engines[name].in_flight
        return None if flight is None else flight.order.kind

    def outcome(self) -> Outcome:
        """Of the one activation that has ended since the last call."""
        ended = [action for action in self.actions if isinstance(action, Ended)]
        self.actions.clear()
        assert len(ended) == 1
        return ended[0].outcome

    def freed(self) -> list[Free]:
        return [action for action in self.actions if isinstance(action, Free)]

    def state(self, name: str) -> EngineState:
        return self.machine.engines[name].state

    def serving(self, number: int, *names: str) -> None:
        """Bring a version to ACTIVE with these engines, all of them new."""
        self.publish(number)
        for name in names:
            self.connect(name)
        self.activate(number, f"activate {number}", min_engines=len(names))
        self.finish_orders(*names)
        self.actions.clear()


def test_a_version_becomes_active_after_every_engine_prefetched_and_swapped() -> None:
    scene = Scene()
    publication = scene.publish(0)
    scene.connect("a")
    scene.connect("b")
    scene.activate(0, min_engines=2)
    assert scene.machine.versions[publication].state is VersionState.ACTIVATING
    assert scene.answer("a").kind is PREFETCH
    assert scene.open("a") is None, "a waits until b has verified the bytes too"
    assert scene.answer("b").kind is PREFETCH
    assert (scene.answer("a").kind, scene.answer("b").kind) == (SWAP, SWAP)
    outcome = scene.outcome()
    assert outcome.ok
    assert (outcome.engines, outcome.quarantined, outcome.pause_s) == (2, 0, 0.25)
    assert scene.machine.versions[publication].state is VersionState.ACTIVE
    assert scene.state("a") is EngineState.SERVING


def test_no_engine_swaps_before_min_engines_have_the_bytes() -> None:
    scene = Scene()
    scene.serving(0, "a")
    scene.publish(1)
    scene.activate(1, min_engines=2)
    scene.answer("a")
    assert scene.state("a") is EngineState.PREFETCHED
    assert scene.open("a") is None
    scene.wait(10)
    outcome = scene.outcome()
    assert not outcome.ok
    assert "0 of 2 engines serve it after 10 s" in outcome.error
    assert scene.machine.engines["a"].held == 1, "an activation that cannot succeed changes no engine"
    assert not scene.machine.engines["a"].quarantined, "it only waited for others"
    assert scene.answer("a").kind is DISCARD


def test_an_engine_joining_during_an_activation_counts() -> None:
    scene = Scene()
    scene.serving(0, "a")
    scene.publish(1)
    scene.activate(1, min_engines=2)
    scene.answer("a")
    scene.connect("b")
    assert scene.answer("b").kind is PREFETCH
    assert (scene.answer("a").kind, scene.answer("b").kind) == (SWAP, SWAP)
    assert scene.outcome().engines == 2


def test_an_engine_joining_during_an_activation_is_not_waited_for() -> None:
    scene = Scene()
    scene.serving(0, "a")
    scene.publish(1)
    scene.activate(1, min_engines=1)
    scene.connect("b")
    scene.answer("a")
    scene.answer("a")
    assert scene.outcome().ok
    assert scene.open("b") is PREFETCH


def test_a_late_joiner_is_brought_to_the_active_version() -> None:
    scene = Scene()
    scene.serving(3, "a")
    scene.connect("b")
    assert scene.state("b") is EngineState.EMPTY
    assert (scene.answer("b").kind, scene.answer("b").kind) == (PREFETCH, SWAP)
    assert scene.state("b") is EngineState.SERVING


@pytest.mark.parametrize("failing", [PREFETCH, SWAP, CHECK])
def test_a_failed_order_quarantines_and_the_next_good_version_readmits(failing: OrderKind) -> None:
    scene = Scene()
    scene.serving(0, "a", "b")
    scene.publish(1)
    scene.activate(1, check=True)
    while scene.open("b") is not failing:
        scene.answer("a")
        scene.answer("b")
    scene.actions.clear()
    scene.answer("b", error="bad bytes")
    told = [action.order.kind for action in scene.actions if isinstance(action, Send) and action.engine_id == "b"]
    assert told == [QUARANTINE], "it is told to stop, and nothing else"
    assert scene.state("b") is EngineState.QUARANTINED
    scene.finish_orders("a")
    outcome = scene.outcome()
    assert (outcome.ok, outcome.engines, outcome.quarantined) == (True, 1, 1)
    scene.publish(2)
    scene.activate(2, "second", min_engines=2)
    scene.finish_orders("a", "b")
    assert scene.outcome().engines == 2
    assert scene.state("b") is EngineState.SERVING


def test_a_quarantined_engine_is_loaded_again_after_a_pause_that_doubles() -> None:
    scene = Scene()
    scene.serving(0, "a")
    scene.connect("b")
    pauses = []
    for _ in range(5):
        scene.answer("b", error="out of memory")
        began = scene.time_s
        while scene.open("b") is None:
            wake = scene.machine.wake_at_s()
            assert wake is not None
            scene.wait(wake - scene.time_s)
        pauses.append(scene.time_s - began)
    assert pauses == [5, 10, 20, 40, 40]
    scene.finish_orders("b")
    assert scene.state("b") is EngineState.SERVING


def test_engines_go_back_to_the_active_version_when_an_activation_fails() -> None:
    scene = Scene()
    scene.serving(0, "a", "b")
    scene.publish(1)
    scene.activate(1, min_engines=2)
    scene.answer("a")
    scene.answer("b")
    scene.answer("a")
    scene.answer("b", error="swap failed")
    scene.wait(10)
    assert not scene.outcome().ok
    assert scene.machine.versions[2].state is VersionState.FAILED
    scene.finish_orders("a", "b")
    assert scene.machine.engines["a"].held == scene.machine.engines["b"].held == 1


def test_an_engine_that_does_not_answer_is_quarantined_at_the_deadline() -> None:
    scene = Scene()
    scene.serving(0, "a", "b")
    scene.publish(1)
    scene.activate(1, deadline_s=10)
    scene.answer("a")
    scene.wait(4.9)
    assert scene.open("a") is None
    scene.wait(0.1)
    assert scene.state("b") is EngineState.QUARANTINED, "half of the time is for prefetching"
    assert scene.answer("a").kind is SWAP
    outcome = scene.outcome()
    assert (outcome.ok, outcome.engines, outcome.quarantined) == (True, 1, 1)
    assert scene.open("b") is PREFETCH, "no new order before the old one is answered"
    scene.wait(100)
    session = scene.machine.engines["b"].session
    late = scene.answer("b")
    assert (late.kind, session) == (PREFETCH, scene.machine.engines["b"].session)
    assert scene.state("b") is EngineState.QUARANTINED, "a late answer earns nothing"
    scene.finish_orders("b")
    assert scene.state("b") is EngineState.SERVING


def test_an_activation_ends_by_its_deadline_when_nobody_answers() -> None:
    scene = Scene()
    scene.serving(0, "a", "b")
    scene.publish(1)
    scene.activate(1, deadline_s=10)
    while scene.machine.activation is not None:
        wake = scene.machine.wake_at_s()
        assert wake is not None
        scene.wait(wake - scene.time_s)
    assert scene.time_s == 10
    outcome = scene.outcome()
    assert (outcome.ok, outcome.quarantined) == (False, 2)


def test_an_engine_lost_during_an_activation_does_not_hold_it_up() -> None:
    scene = Scene()
    scene.serving(0, "a", "b")
    scene.publish(1)
    scene.activate(1)
    scene.answer("a")
    scene.disconnect("b")
    assert scene.answer("a").kind is SWAP
    assert scene.outcome().ok
    scene.connect("b")
    assert scene.state("b") is EngineState.QUARANTINED
    assert (scene.answer("b").kind, scene.answer("b").kind) == (PREFETCH, SWAP)
    assert scene.state("b") is EngineState.SERVING


def test_a_reconnecting_engine_is_believed_when_it_names_bytes_that_are_known() -> None:
    scene = Scene()
    scene.serving(0, "a")
    scene.disconnect("a")
    scene.connect("a", 0, b"c1")
    assert scene.state("a") is EngineState.SERVING
    assert scene.open("a") is None


@pytest.mark.parametrize(("number", "checksum"), [(0, b"other"), (7, b"c1"), (0, b"")])
def test_a_reconnecting_engine_with_other_bytes_is_loaded_anew(number: int, checksum: bytes) -> None:
    scene = Scene()
    scene.serving(0, "a")
    scene.disconnect("a")
    scene.connect("a", number, checksum)
    assert scene.state("a") is EngineState.EMPTY
    assert scene.open("a") is PREFETCH


def test_a_second_subscription_of_an_engine_ends_the_first() -> None:
    scene = Scene()
    scene.serving(0, "a")
    first = scene.machine.engines["a"].session
    scene.connect("a")
    assert Disconnect("a", first or 0) in scene.actions
    assert scene.machine.report("a", first or 0, 1, None, 0, 0, scene.now()) == []
    assert scene.machine.disconnect("a", first or 0, scene.now()) == []
    assert scene.open("a") is PREFETCH


def test_repeating_an_operation_does_nothing_more() -> None:
    scene = Scene()
    scene.publish(0)
    scene.connect("a")
    scene.activate(0, "op")
    scene.actions.clear()
    scene.activate(0, "op")
    assert scene.actions == []
    scene.finish_orders("a")
    assert scene.outcome().ok
    scene.activate(0, "op")
    assert scene.actions == []
    assert scene.machine.outcomes["op"].ok


def test_another_operation_for_the_same_version_shares_the_outcome() -> None:
    scene = Scene()
    scene.publish(0)
    scene.connect("a")
    scene.activate(0, "first")
    scene.activate(0, "second")
    scene.finish_orders("a")
    ended = [action for action in scene.actions if isinstance(action, Ended)]
    assert [action.operation_ids for action in ended] == [("first", "second")]


def test_an_activation_of_another_version_takes_over() -> None:
    scene = Scene()
    scene.serving(0, "a")
    scene.publish(1)
    scene.publish(2)
    scene.activate(1, "first")
    scene.answer("a")
    scene.activate(2, "second")
    first = scene.outcome()
    assert not first.ok
    assert "version 2 is to be activated instead" in first.error
    scene.finish_orders("a")
    assert scene.outcome().ok
    assert scene.machine.engines["a"].held == 3


def test_a_number_published_again_is_another_publication() -> None:
    scene = Scene()
    scene.serving(5, "a")
    scene.publish(5)
    scene.activate(5, "activate 5")
    assert scene.open("a") is PREFETCH, "the operation id belonged to the former publication"
    scene.finish_orders("a")
    assert scene.machine.engines["a"].held == 2


def test_going_back_to_an_older_number_works() -> None:
    scene = Scene()
    scene.serving(8, "a")
    scene.publish(5)
    scene.activate(5)
    scene.finish_orders("a")
    assert scene.outcome().ok
    assert scene.machine.versions[scene.machine.active or 0].number == 5


@pytest.mark.parametrize(("prepared", "error"), [(False, "not prepared"), (None, "never published")])
def test_only_a_complete_version_can_be_activated(prepared: bool | None, error: str) -> None:
    scene = Scene()
    if prepared is not None:
        scene.machine.allocate(0, 64, scene.now())
    with pytest.raises(Refused, match=error):
        scene.activate(0)
    assert scene.machine.activation is None


def test_a_newer_allocation_gives_up_an_unfinished_one() -> None:
    scene = Scene()
    version, _ = scene.machine.allocate(0, 64, scene.now())
    second = scene.publish(0)
    assert scene.freed() == [Free(version.publication_id, reusable=False)], "its writer may still be at it"
    with pytest.raises(UnknownVersion, match="allocate again"):
        scene.machine.prepare(version.publication_id, b"c", scene.now())
    assert scene.machine.find(0).publication_id == second


def test_bytes_are_freed_once_every_engine_has_let_go() -> None:
    scene = Scene()
    scene.serving(0, "a", "b")
    scene.publish(1)
    scene.activate(1, min_engines=2)
    scene.finish_orders("a")
    scene.answer("b")
    scene.answer("a")
    scene.answer("b")
    assert scene.machine.engines["a"].held == scene.machine.engines["b"].held == 2
    assert scene.freed() == []
    assert scene.answer("a").kind is DISCARD
    assert scene.freed() == [], "b still maps it"
    assert scene.answer("b").kind is DISCARD
    assert scene.freed() == [Free(1, reusable=True)]


def test_memory_that_an_engine_may_still_map_is_not_reused() -> None:
    scene = Scene()
    scene.serving(0, "a")
    scene.publish(1)
    scene.activate(1)
    scene.answer("a")
    scene.answer("a")
    assert scene.answer("a", error="still mapped").kind is DISCARD
    assert scene.freed() == [Free(1, reusable=False)]
    assert scene.state("a") is EngineState.SERVING, "it serves the right version all the same"


def test_a_version_is_kept_until_it_is_below_the_lowest_needed() -> None:
    scene = Scene()
    scene.serving(0, "a", "b")
    scene.publish(1)
    scene.publish(2)
    scene.activate(2, min_engines=2)
    while scene.machine.activation is not None:
        scene.answer("a" if scene.open("a") else "b")
    assert scene.machine.versions[2].state is VersionState.RETIRED, "passed over"
    assert scene.answer("a").kind is DISCARD
    assert scene.freed() == [], "b still has version 0"
    assert scene.answer("b").kind is DISCARD
    assert [free.publication_id for free in scene.freed()] == [1, 2]


def test_a_failed_version_is_freed_when_the_next_is_allocated() -> None:
    scene = Scene()
    scene.publish(0)
    scene.activate(0, deadline_s=1)
    scene.wait(1)
    assert not scene.outcome().ok
    assert scene.freed() == [], "it may be activated again"
    scene.publish(1)
    assert scene.freed() == [Free(1, reusable=True)]


def test_a_failed_version_can_be_activated_again() -> None:
    scene = Scene()
    scene.publish(0)
    scene.activate(0, "too early", deadline_s=1)
    scene.wait(1)
    assert not scene.outcome().ok
    scene.connect("a")
    scene.activate(0, "again")
    scene.finish_orders("a")
    assert scene.outcome().ok


def test_check_compares_the_bytes_before_an_engine_counts() -> None:
    scene = Scene()
    scene.serving(0, "a")
    scene.activate(0, "check", check=True)
    assert scene.machine.activation is not None
    assert scene.answer("a").kind is CHECK
    assert scene.outcome().ok


def test_releasing_a_job_frees_everything_and_ends_its_activation() -> None:
    scene = Scene()
    scene.serving(0, "a")
    scene.publish(1)
    scene.activate(1)
    scene.actions += scene.machine.release(scene.now())
    assert {free.publication_id for free in scene.freed()} == {1, 2}
    assert "released" in scene.outcome().error
    scene.answer("a")
    assert scene.open("a") is None
    assert scene.machine.versions == {}


def test_a_restored_machine_carries_on() -> None:
    scene = Scene()
    scene.serving(0, "a", "b")
    scene.publish(1)
    scene.activate(1, "op")
    scene.answer("b", error="bad bytes")
    scene.machine = snapshot.load(snapshot.save(scene.machine), scene.now(), scene.machine.limits)
    assert scene.machine.activation is None
    assert scene.machine.versions[2].state is VersionState.PREPARED
    scene.connect("a", 0, b"c1")
    scene.connect("b", None)
    assert scene.state("a") is EngineState.SERVING
    assert scene.state("b") is EngineState.QUARANTINED, "a restart does not readmit"
    scene.activate(1, "op", min_engines=2)
    scene.finish_orders("a", "b")
    assert scene.machine.engines["a"].held == scene.machine.engines["b"].held == 2
    assert not [free for free in scene.freed() if free.reusable], "who maps what was forgotten"


def test_an_engine_that_stays_away_is_forgotten() -> None:
    scene = Scene()
    scene.serving(0, "a", "b")
    scene.publish(1)
    scene.activate(1)
    scene.disconnect("b")
    assert "b" in scene.machine.engines
    scene.wait(3601)
    assert "b" not in scene.machine.engines


@pytest.mark.parametrize("engines", [("a",), ("a", "b", "c")])
@pytest.mark.parametrize("at", [PREFETCH, SWAP])
def test_a_version_that_every_engine_refuses_fails_at_once_and_for_good(
    engines: tuple[str, ...], at: OrderKind
) -> None:
    scene = Scene()
    scene.publish(0)
    for name in engines:
        scene.connect(name)
    scene.activate(0, deadline_s=100, min_engines=len(engines))
    scene.refuse(*engines, at=at)
    outcome = scene.outcome()
    assert (outcome.ok, outcome.refused, outcome.total_s) == (False, True, 0.0)
    words = "; ".join(f"{name}: {at.value} of version 0: lm_head.weight is missing" for name in engines)
    assert outcome.error == f"no engine can take it; {words}"
    assert scene.machine.versions[1].state is VersionState.FAILED


def test_an_engine_that_refuses_is_left_out_while_others_serve() -> None:
    scene = Scene()
    scene.publish(0)
    for name in ("a", "b", "c"):
        scene.connect(name)
    scene.activate(0, deadline_s=100, min_engines=2)
    scene.refuse("a", "b", at=PREFETCH)
    scene.finish_orders("c")
    outcome = scene.outcome()
    assert (outcome.ok, outcome.refused, outcome.engines, outcome.quarantined) == (True, False, 1, 2)
    assert scene.state("a") is EngineState.QUARANTINED
    assert scene.machine.engines["a"].last_error == "prefetch of version 0: lm_head.weight is missing"


def test_what_was_refused_is_not_ordered_again_before_the_engine_attaches_again() -> None:
    scene = Scene()
    scene.serving(0, "a")
    scene.connect("b")
    scene.refuse("b", at=PREFETCH)
    scene.wait(1000)
    assert scene.open("b") is None
    scene.connect("b")
    scene.finish_orders("b")
    assert scene.state("b") is EngineState.SERVING


def test_a_newer_version_is_tried_by_an_engine_that_refused_the_one_before() -> None:
    scene = Scene()
    scene.serving(0, "a", "b")
    scene.publish(1)
    scene.activate(1, "second")
    scene.refuse("b", at=PREFETCH)
    scene.finish_orders("a")
    assert scene.outcome().ok
    scene.publish(2)
    scene.activate(2, "third", min_engines=2)
    scene.finish_orders("a", "b")
    assert scene.outcome().ok
    assert scene.state("b") is EngineState.SERVING


@pytest.mark.parametrize("comes_back", [True, False])
def test_an_engine_that_is_away_may_still_come_to_take_what_the_other_refuses(comes_back: bool) -> None:
    scene = Scene()
    scene.publish(0)
    scene.connect("a")
    scene.connect("b")
    scene.activate(0, deadline_s=100, min_engines=1)
    scene.disconnect("b")
    scene.refuse("a", at=PREFETCH)
    assert scene.machine.activation is not None
    if comes_back:
        scene.connect("b")
        scene.finish_orders("b")
        assert scene.outcome().ok
    else:
        scene.wait(100)
        assert scene.outcome().refused


def test_a_failure_that_may_pass_is_tried_again_beside_a_refusal() -> None:
    scene = Scene()
    scene.publish(0)
    scene.connect("a")
    scene.connect("b")
    scene.activate(0, deadline_s=100, min_engines=1)
    scene.answer("b", "the server died")
    scene.refuse("a", at=PREFETCH)
    assert scene.machine.activation is not None
    scene.wait(5)
    scene.finish_orders("b")
    assert scene.outcome().ok


def test_a_refusal_counts_also_when_it_comes_too_late() -> None:
    scene = Scene()
    scene.publish(0)
    scene.connect("a")
    scene.activate(0, deadline_s=10)
    scene.wait(10)
    assert not scene.outcome().refused
    scene.activate(0, "again", deadline_s=10)
    scene.answer("a", "lm_head.weight is missing", refused=True)
    assert scene.outcome().refused
    scene.activate(0, "third", deadline_s=10)
    assert scene.outcome().refused


def test_an_engine_that_cannot_get_a_version_is_not_waited_for_and_keeps_the_one_it_has() -> None:
    scene = Scene()
    scene.serving(0, "a", "b")
    scene.publish(1, out_of_reach=["b"])
    scene.activate(1)
    scene.finish_orders("a")
    assert scene.outcome().ok
    assert scene.open("b") is None
    assert scene.state("b") is EngineState.SERVING
    scene.publish(2)
    scene.activate(2, "next", min_engines=2)
    scene.finish_orders("a", "b")
    assert scene.outcome().engines == 2


def test_an_engine_that_comes_late_is_not_ordered_to_load_what_it_cannot_get() -> None:
    scene = Scene()
    scene.serving(0, "a")
    scene.connect("late", out_of_reach=[1])
    scene.wait(100)
    assert scene.open("late") is None
    assert scene.state("late") is EngineState.EMPTY
    scene.disconnect("late")
    scene.connect("late")
    assert scene.open("late") is PREFETCH, "it may have moved"


def test_an_activation_that_no_engine_can_take_part_in_fails_at_once_and_may_be_repeated() -> None:
    scene = Scene()
    scene.connect("a")
    scene.publish(0, out_of_reach=["a"])
    scene.activate(0)
    outcome = scene.outcome()
    assert not outcome.ok
    assert not outcome.refused
    assert "publish it again" in outcome.error
    scene.publish(0)
    scene.activate(0, "again")
    scene.finish_orders("a")
    assert scene.outcome().ok


def test_engines_that_cannot_get_a_version_do_not_count_among_those_that_have_to_serve_it() -> None:
    scene = Scene()
    for name in ("near", "far", "farther"):
        scene.connect(name)
    scene.publish(0, out_of_reach=["far", "farther"])
    scene.activate(0, min_engines=2)
    scene.finish_orders("near")
    outcome = scene.outcome()
    assert (outcome.ok, outcome.engines) == (True, 1)


def test_engines_that_are_gone_do_not_hold_up_the_end_of_an_activation_that_nobody_attached_can_take_part_in() -> None:
    scene = Scene()
    scene.connect("gone")
    scene.publish(0)
    scene.activate(0)
    scene.disconnect("gone")
    assert scene.state("gone") is EngineState.QUARANTINED
    assert scene.machine.activation is not None
    scene.connect("far", out_of_reach=[1])
    assert "publish it again" in scene.outcome().error
