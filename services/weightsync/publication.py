"""Publication of one stream of weights: who holds which version, and what has to happen next.

A pure state machine: events in, actions out, no I/O and no clock of its own. Every event returns actions that the
caller carries out in order. The rule that drives it: each engine is led to the *target* (the version being activated,
else the active one) by prefetch, then swap, one order at a time.

    ALLOCATED -> PREPARED -> ACTIVATING -> ACTIVE -> RETIRED
                                 `-> FAILED (the active version stays active, and engines are led back to it)

During an activation nobody swaps before every engine has verified the bytes or is quarantined, and at least
`min_engines` have: an activation that cannot succeed changes no engine.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from miles.services.weightsync import garbage
from miles.services.weightsync.activation import Activation
from miles.services.weightsync.state import (
    Action,
    Disconnect,
    Ended,
    Engine,
    EngineChanged,
    Free,
    InFlight,
    Now,
    Order,
    OrderKind,
    Outcome,
    Refused,
    Send,
    Settings,
    UnknownVersion,
    Version,
    VersionState,
)

_OUTCOMES_KEPT = 256


class Publication:
    """The state of one stream of one job."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.versions: dict[int, Version] = {}
        """By publication id, oldest first."""
        self.engines: dict[str, Engine] = {}
        self.active: int | None = None
        self.activation: Activation | None = None
        self.outcomes: dict[str, Outcome] = {}
        """Of past activations, by operation id."""
        self.next_publication_id = 1
        self._now_s = 0.0

    # -- the trainer's and the controller's events --------------------------------------------------------------------

    def allocate(self, number: int, nbytes: int, now: Now) -> tuple[Version, list[Action]]:
        """The trainer wants room for a version. What it allocated before and never prepared is given up."""
        for old in self.versions.values():
            if old.state is VersionState.ALLOCATED:
                old.state, old.reusable = VersionState.FAILED, False
        version = Version(self.next_publication_id, number, nbytes)
        self.next_publication_id += 1
        self.versions[version.publication_id] = version
        return version, self._settle(now)

    def give_up(self, publication_id: int, now: Now) -> list[Action]:
        """The bytes of a publication cannot be had: no room for them, or lost with the machine's memory."""
        self.versions.pop(publication_id, None)
        if self.active == publication_id:
            self.active = None
        return self._settle(now)

    def prepare(self, publication_id: int, checksum: bytes, now: Now) -> list[Action]:
        """The trainer has written every byte of an allocation. Idempotent; Refused for another manifest."""
        version = self.versions.get(publication_id)
        if version is None or (version.state is VersionState.FAILED and not version.checksum):
            raise UnknownVersion("its allocation was replaced by a later one or freed; allocate again")
        if version.state is not VersionState.ALLOCATED:
            if version.checksum != checksum:
                raise Refused("it was prepared with another manifest; allocate again to publish other bytes")
            return []
        version.state, version.checksum = VersionState.PREPARED, checksum
        return self._settle(now)

    def activate(
        self,
        number: int,
        operation_id: str,
        deadline_s: float,
        min_engines: int,
        check_equal: bool,
        now: Now,
        wait_for: Collection[str] = (),
    ) -> list[Action]:
        """Bring every engine to a version within `deadline_s` seconds.

        `wait_for` names the engines to wait for, as far as they are attached; empty means all. Repeating an operation
        does nothing; another operation for the same publication joins the one under way, and may only wait for fewer
        engines; one for another publication ends it: the latest wish counts.
        """
        version = self.find(number)
        past = self.outcomes.get(operation_id)
        if past is not None and past.publication_id == version.publication_id:
            return []
        actions: list[Action] = []
        if self.activation is not None:
            if self.activation.publication_id == version.publication_id:
                if operation_id not in self.activation.operation_ids:
                    self.activation.operation_ids.append(operation_id)
                if wait_for:
                    self.activation.waited_for.intersection_update(wait_for)
                return self._settle(now)
            self._end(now, actions, f"version {number} is to be activated instead")
        for engine in self.engines.values():
            engine.retry_at_s = now.monotonic_s
        self.activation = Activation(
            publication_id=version.publication_id,
            operation_ids=[operation_id],
            began_s=now.monotonic_s,
            deadline_s=now.monotonic_s + deadline_s,
            min_engines=min_engines,
            check_equal=check_equal,
            waited_for={
                engine.engine_id
                for engine in self.engines.values()
                if engine.session is not None
                and not engine.quarantined
                and (not wait_for or engine.engine_id in wait_for)
            },
        )
        if version.publication_id != self.active:
            version.state = VersionState.ACTIVATING
        return actions + self._settle(now)

    def release(self, now: Now) -> list[Action]:
        """The job is over: end what is under way and free everything."""
        actions: list[Action] = []
        self._end(now, actions, "the job was released")
        self.active = None
        for publication_id in list(self.versions):
            self._free(publication_id, actions, reusable=False)
        for engine in self.engines.values():
            engine.held = engine.verified = None
        return actions

    # -- the engines' events ------------------------------------------------------------------------------------------

    def connect(self, engine_id: str, session: int, number: int | None, checksum: bytes, now: Now) -> list[Action]:
        """An engine subscribed and says what it serves. What is not a version known here counts as nothing."""
        actions: list[Action] = []
        engine = self.engines.setdefault(engine_id, Engine(engine_id))
        if engine.session is not None:
            actions.append(Disconnect(engine_id, engine.session))
            self._lose(engine, now, actions)
        engine.session, engine.next_order_id = session, 1
        engine.retry_at_s = min(engine.retry_at_s, now.monotonic_s)
        engine.since_unix_ns = now.unix_ns
        held = self._identify(number, checksum)
        if held is not None:
            engine.maps[held.publication_id] = held.number
            engine.held = None if engine.quarantined else held.publication_id
        if engine.quarantined:
            self._send(engine, OrderKind.QUARANTINE, None, actions, engine.last_error)
        actions.append(EngineChanged(engine_id))
        return actions + self._settle(now)

    def disconnect(self, engine_id: str, session: int, now: Now) -> list[Action]:
        """A subscription ended. The engine may live on and serve; its bytes must not be rewritten under it."""
        engine = self.engines.get(engine_id)
        if engine is None or engine.session != session:
            return []
        actions: list[Action] = []
        self._lose(engine, now, actions)
        if not engine.quarantined:
            del self.engines[engine_id]
        return actions + self._settle(now)

    def report(
        self, engine_id: str, session: int, order_id: int, error: str | None, elapsed_s: float, pause_s: float, now: Now
    ) -> list[Action]:
        """An engine answered an order; `error` None means done. Answers to other than its open order mean nothing."""
        engine = self.engines.get(engine_id)
        flight = None if engine is None or engine.session != session else engine.in_flight
        if engine is None or flight is None or flight.order.order_id != order_id:
            return []
        engine.in_flight = None
        actions: list[Action] = []
        if error is None:
            engine.stage_s[flight.order.kind.value] = elapsed_s
        if flight.order.kind is OrderKind.DROP:
            self._let_go(engine, flight.order.publication_id, clean=error is None)
        elif flight.expired:
            pass  # it is quarantined already, and starts over
        elif error is not None:
            what = f"{flight.order.kind.value} of version {flight.order.number}"
            self._quarantine(engine, f"{what}: {error}", now, actions)
        elif flight.order.publication_id in self.versions:
            self._done(engine, flight.order, pause_s, now)
            actions.append(EngineChanged(engine_id))
        return actions + self._settle(now)

    def tick(self, now: Now) -> list[Action]:
        """Time has passed; call at the latest at `wake_at_s`."""
        return self._settle(now)

    # -- questions ----------------------------------------------------------------------------------------------------

    @property
    def target(self) -> int | None:
        """The publication that every engine is being led to."""
        return self.active if self.activation is None else self.activation.publication_id

    def find(self, number: int) -> Version:
        """The newest complete publication of a version number; UnknownVersion or Refused when there is none."""
        found = [version for version in self.versions.values() if version.number == number]
        complete = [version for version in found if version.checksum]
        if complete:
            return complete[-1]
        if found:
            raise Refused("its bytes are not complete: the trainer has allocated but not prepared it")
        raise UnknownVersion("it was never published, or has been freed")

    def wake_at_s(self) -> float | None:
        """When `tick` is due at the latest, on the monotonic clock; None when only an event can change anything."""
        times = [e.in_flight.deadline_s for e in self.engines.values() if e.in_flight and not e.in_flight.expired]
        times += [e.retry_at_s for e in self.engines.values() if e.quarantined and e.session and not e.in_flight]
        if self.activation is not None:
            times += [self.activation.prefetch_deadline_s, self.activation.deadline_s]
        return min((time for time in times if time > self._now_s), default=None)

    # -- how state follows events -------------------------------------------------------------------------------------

    def _settle(self, now: Now) -> list[Action]:
        """Let time and the last event take effect, then give every idle engine its next order."""
        self._now_s = now.monotonic_s
        actions: list[Action] = []
        for engine in list(self.engines.values()):
            self._expire(engine, now, actions)
        self._advance(now, actions)
        for engine in self.engines.values():
            self._lead(engine, now, actions)
        keep = garbage.needed(self.engines.values(), (self.active, self.target))
        for version in garbage.unneeded(self.versions, keep):
            self._free(version.publication_id, actions, version.reusable)
        return actions

    def _expire(self, engine: Engine, now: Now, actions: list[Action]) -> None:
        flight = engine.in_flight
        if flight is not None and not flight.expired and now.monotonic_s >= flight.deadline_s:
            flight.expired = True
            what = f"{flight.order.kind.value} of version {flight.order.number}"
            self._quarantine(engine, f"no answer to {what} within {flight.allowed_s:g} s", now, actions)
        if engine.session is None and now.unix_ns - engine.since_unix_ns > self.settings.forget_s * 1e9:
            del self.engines[engine.engine_id]

    def _advance(self, now: Now, actions: list[Action]) -> None:
        """Move the activation on: from prefetching to swapping to its end."""
        activation = self.activation
        if activation is None:
            return
        if not activation.swapping and activation.ready(self.engines) >= activation.min_engines:
            if now.monotonic_s >= activation.prefetch_deadline_s:
                self._quarantine_late(activation.without_bytes(self.engines), now, actions)
            activation.swapping = not activation.without_bytes(self.engines)
        late = now.monotonic_s >= activation.deadline_s
        if late:
            # Whoever is idle waited for others, and is not to blame.
            pending = [engine for engine in activation.pending(self.engines) if engine.in_flight is not None]
            self._quarantine_late(pending, now, actions)
        serving = activation.serving(self.engines)
        enough = activation.swapping and serving >= activation.min_engines
        if enough and (late or not activation.pending(self.engines)):
            self._end(now, actions)
        elif late:
            allowed_s = activation.deadline_s - activation.began_s
            self._end(now, actions, f"{serving} of {activation.min_engines} engines serve it after {allowed_s:g} s")

    def _end(self, now: Now, actions: list[Action], error: str = "") -> None:
        """Close the activation under way, if any; an error is why it failed."""
        activation, self.activation = self.activation, None
        if activation is None:
            return
        version = self.versions[activation.publication_id]
        if not error:
            self._make_active(version, now)
        elif version.publication_id != self.active:
            version.state = VersionState.FAILED
        outcome = activation.outcome(self.engines, now.monotonic_s, error)
        for operation_id in activation.operation_ids:
            self.outcomes.pop(operation_id, None)
            self.outcomes[operation_id] = outcome
        while len(self.outcomes) > _OUTCOMES_KEPT:
            del self.outcomes[next(iter(self.outcomes))]
        actions.append(Ended(tuple(activation.operation_ids), outcome))

    def _make_active(self, version: Version, now: Now) -> None:
        if self.active != version.publication_id:
            version.active_unix_ns = now.unix_ns
        self.active = version.publication_id
        for other in self.versions.values():
            passed_over = other.state is VersionState.PREPARED and other.publication_id < self.active
            if passed_over or other.state is VersionState.ACTIVE:
                other.state = VersionState.RETIRED
        version.state = VersionState.ACTIVE

    def _lead(self, engine: Engine, now: Now, actions: list[Action]) -> None:
        """Give an idle engine the next order on its way to the target."""
        if engine.session is None or engine.in_flight is not None:
            return
        if engine.quarantined and now.monotonic_s < engine.retry_at_s:
            return
        target, activation = self.target, self.activation
        if target is not None and engine.held != target:
            if engine.verified != target:
                self._order(engine, OrderKind.PREFETCH, target, now, actions)
            elif activation is None or activation.swapping:
                self._order(engine, OrderKind.SWAP, target, now, actions)
        elif engine.quarantined:
            return
        elif activation is not None:
            if activation.swapping and not activation.complete(engine):
                self._order(engine, OrderKind.CHECK, activation.publication_id, now, actions)
        elif unwanted := [publication_id for publication_id in engine.maps if publication_id != engine.held]:
            self._order(engine, OrderKind.DROP, min(unwanted), now, actions)

    def _order(self, engine: Engine, kind: OrderKind, publication_id: int, now: Now, actions: list[Action]) -> None:
        """Send an order that is to be answered."""
        if kind is OrderKind.PREFETCH:
            engine.verified = None
            engine.maps[publication_id] = self.versions[publication_id].number
        deadline_s = now.monotonic_s + self.settings.load_deadline_s
        if self.activation is not None and engine.engine_id in self.activation.waited_for:
            deadline_s = self.activation.deadline_s
        order = self._send(engine, kind, publication_id, actions)
        engine.in_flight = InFlight(order, deadline_s, deadline_s - now.monotonic_s)

    def _send(
        self, engine: Engine, kind: OrderKind, publication_id: int | None, actions: list[Action], reason: str = ""
    ) -> Order:
        number = 0 if publication_id is None else engine.maps[publication_id]
        order = Order(engine.next_order_id, kind, publication_id or 0, number, reason)
        if engine.session is not None:
            engine.next_order_id += 1
            actions.append(Send(engine.engine_id, engine.session, order))
        return order

    def _done(self, engine: Engine, order: Order, pause_s: float, now: Now) -> None:
        """Credit an order that was carried out in time."""
        if order.kind is OrderKind.PREFETCH:
            engine.verified = order.publication_id
        elif order.kind is OrderKind.SWAP:
            engine.held, engine.verified, engine.pause_s = order.publication_id, None, pause_s
            engine.quarantined, engine.last_error, engine.failures = False, "", 0
            engine.since_unix_ns = now.unix_ns
            if self.activation is not None and order.publication_id == self.activation.publication_id:
                self.activation.swapped.add(engine.engine_id)
        elif order.kind is OrderKind.CHECK and self.activation is not None:
            engine.checked_by = self.activation.operation_id

    def _quarantine(self, engine: Engine, reason: str, now: Now, actions: list[Action]) -> None:
        """Out of routing: nothing it holds counts any more."""
        settings = self.settings
        engine.quarantined, engine.last_error = True, reason
        engine.held = engine.verified = None
        engine.retry_at_s = now.monotonic_s + min(settings.first_retry_s * 2**engine.failures, settings.last_retry_s)
        engine.failures = min(engine.failures + 1, 30)
        engine.since_unix_ns = now.unix_ns
        if self.activation is not None:
            self.activation.waited_for.discard(engine.engine_id)
            self.activation.quarantined.add(engine.engine_id)
        self._send(engine, OrderKind.QUARANTINE, None, actions, reason)
        actions.append(EngineChanged(engine.engine_id))

    def _quarantine_late(self, engines: Iterable[Engine], now: Now, actions: list[Action]) -> None:
        for engine in engines:
            doing = "nothing"
            if (flight := engine.in_flight) is not None:
                doing, flight.expired = f"{flight.order.kind.value} of version {flight.order.number}", True
            self._quarantine(engine, f"did not get there in time; it was at {doing}", now, actions)

    def _lose(self, engine: Engine, now: Now, actions: list[Action]) -> None:
        """Its subscription is gone. With an order open, or while an activation counts on it, that is a failure."""
        busy = engine.in_flight is not None and engine.in_flight.order.kind is not OrderKind.DROP
        counted_on = self.activation is not None and engine.engine_id in self.activation.waited_for
        for publication_id in list(engine.maps):
            self._let_go(engine, publication_id, clean=False)
        engine.session = engine.in_flight = engine.held = engine.verified = None
        engine.since_unix_ns = now.unix_ns
        if (busy or counted_on) and not engine.quarantined:
            self._quarantine(engine, "its subscription ended during an update", now, actions)

    def _let_go(self, engine: Engine, publication_id: int, clean: bool) -> None:
        """An engine does not need a publication's bytes any more; unless that is `clean`, it may still map them."""
        engine.maps.pop(publication_id, None)
        if engine.verified == publication_id:
            engine.verified = None
        version = self.versions.get(publication_id)
        if version is not None and not clean:
            version.reusable = False

    def _free(self, publication_id: int, actions: list[Action], reusable: bool) -> None:
        del self.versions[publication_id]
        for engine in self.engines.values():
            if publication_id in engine.maps:
                del engine.maps[publication_id]
                reusable = False
        actions.append(Free(publication_id, reusable))

    def _identify(self, number: int | None, checksum: bytes) -> Version | None:
        """The newest publication with that number and manifest."""
        if number is None or not checksum:
            return None
        found = [v for v in self.versions.values() if v.number == number and v.checksum == checksum]
        return found[-1] if found else None
