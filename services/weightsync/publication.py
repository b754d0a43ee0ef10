"""Publication of one stream of weights: who holds which version, and what has to happen next.

A pure state machine: events in, actions out, no I/O and no clock of its own. Every event method may return actions for
the caller to carry out in order. The rule that drives it: each engine is led to the *target* (the version being
activated, else the active one) by prefetch, then swap, one order at a time.

    ALLOCATED -> PREPARED -> ACTIVATING -> ACTIVE -> RETIRED
                                 `-> FAILED (the active version stays active, and engines are led back to it)

During an activation nobody swaps before every engine has verified the bytes or is quarantined, and at least
`min_engines` have: an activation that cannot succeed changes no engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from miles.services.weightsync.records import (
    Action,
    Activation,
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
    UnknownVersion,
    Version,
    VersionState,
)

_OUTCOMES_KEPT = 256


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """Times in seconds."""

    load_deadline_s: float = 120.0
    """How long an engine may take over one order outside an activation (catching up, letting go of bytes)."""
    first_retry_s: float = 5.0
    """How long a quarantined engine waits for its next full load; doubles with each failure."""
    last_retry_s: float = 120.0
    forget_s: float = 3600.0
    """How long a quarantined engine that has gone away is remembered."""


class Publication:
    """The state of one stream of one job."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.versions: dict[int, Version] = {}
        self.engines: dict[str, Engine] = {}
        self.active: int | None = None
        self.activation: Activation | None = None
        self.outcomes: dict[str, Outcome] = {}
        self._next_publication_id = 1
        self._now_s = 0.0

    # -- events -------------------------------------------------------------------------------------------------------

    def allocate(self, number: int, nbytes: int, now: Now) -> tuple[Version, list[Action]]:
        """The trainer wants room for a version. What it allocated before and never prepared is given up."""
        for old in self.versions.values():
            if old.state is VersionState.ALLOCATED:
                old.state, old.reusable = VersionState.FAILED, False
        version = Version(self._next_publication_id, number, nbytes)
        self._next_publication_id += 1
        self.versions[version.publication_id] = version
        return version, self._settle(now)

    def give_up(self, publication_id: int, now: Now) -> list[Action]:
        """There was no room for an allocation."""
        self.versions.pop(publication_id, None)
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
        self, number: int, operation_id: str, deadline_s: float, min_engines: int, check_equal: bool, now: Now
    ) -> list[Action]:
        """Bring every engine to a version. Idempotent per operation; a second operation for the same version joins."""
        if operation_id in self.outcomes or (self.activation and operation_id in self.activation.operation_ids):
            return []
        version = self.find(number)
        if self.activation is not None:
            current = self.versions[self.activation.publication_id]
            if current is not version:
                raise Refused(f"version {current.number} is being activated; wait for that to end")
            self.activation.operation_ids.append(operation_id)
            return []
        for engine in self.engines.values():
            engine.retry_at_s = now.monotonic_s
        waited_for = {e.engine_id for e in self.engines.values() if e.session is not None and not e.quarantined}
        self.activation = Activation(
            publication_id=version.publication_id,
            operation_ids=[operation_id],
            began_s=now.monotonic_s,
            deadline_s=now.monotonic_s + deadline_s,
            min_engines=min_engines,
            check_equal=check_equal,
            waited_for=waited_for,
        )
        if version.publication_id != self.active:
            version.state = VersionState.ACTIVATING
        return self._settle(now)

    def connect(self, engine_id: str, session: int, number: int | None, checksum: bytes, now: Now) -> list[Action]:
        """An engine subscribed and says what it serves. What is not a version known here counts as nothing."""
        actions: list[Action] = []
        engine = self.engines.setdefault(engine_id, Engine(engine_id))
        if engine.session is not None:
            actions.append(Disconnect(engine_id, engine.session))
            self._lose(engine, now, actions)
        engine.session, engine.next_order_id = session, 1
        held = self._identify(number, checksum)
        engine.held = None if engine.quarantined else held
        engine.maps = set() if held is None else {held}
        engine.retry_at_s = min(engine.retry_at_s, now.monotonic_s)
        engine.since_unix_ns = now.unix_ns
        if engine.quarantined:
            self._order(engine, OrderKind.QUARANTINE, 0, now, actions, engine.last_error)
        actions.append(EngineChanged(engine_id))
        return actions + self._settle(now)

    def disconnect(self, engine_id: str, session: int, now: Now) -> list[Action]:
        """A subscription ended. The engine may live on and serve; it must not be reached by a rewrite of its bytes."""
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
        if engine is None or engine.session != session or engine.in_flight is None:
            return []
        if engine.in_flight.order.order_id != order_id:
            return []
        order, expired = engine.in_flight.order, engine.in_flight.expired
        engine.in_flight = None
        actions: list[Action] = []
        if order.kind is OrderKind.DROP:
            self._let_go(engine, order.publication_id, clean=error is None)
        elif expired:
            pass
        elif error is not None:
            self._quarantine(
                engine, f"{order.kind.value} of {self._label(order.publication_id)}: {error}", now, actions
            )
        else:
            self._done(engine, order, elapsed_s, pause_s, now)
            actions.append(EngineChanged(engine_id))
        return actions + self._settle(now)

    def tick(self, now: Now) -> list[Action]:
        """Time has passed; call at the latest at `wake_at_s`."""
        return self._settle(now)

    def release(self, now: Now) -> list[Action]:
        """The job is over: end what is under way and free everything."""
        actions: list[Action] = []
        self._end(now, actions, "the job was released")
        actions += [Free(v.publication_id, reusable=False) for v in self.versions.values()]
        self.versions.clear()
        self.active = None
        return actions

    # -- questions ----------------------------------------------------------------------------------------------------

    def find(self, number: int) -> Version:
        """The newest complete publication of a version number; UnknownVersion or Refused when there is none."""
        found = [v for v in self.versions.values() if v.number == number]
        complete = [v for v in found if v.checksum]
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
            times += [self._prefetch_deadline_s(self.activation), self.activation.deadline_s]
        return min((time for time in times if time > self._now_s), default=None)

    @property
    def target(self) -> int | None:
        """The publication that every engine is being led to."""
        return self.active if self.activation is None else self.activation.publication_id

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
        self._collect(actions)
        return actions

    def _expire(self, engine: Engine, now: Now, actions: list[Action]) -> None:
        flight = engine.in_flight
        if flight is not None and not flight.expired and now.monotonic_s >= flight.deadline_s:
            flight.expired = True
            what = f"{flight.order.kind.value} of {self._label(flight.order.publication_id)}"
            self._quarantine(engine, f"no answer to {what} after {flight.allowed_s:g} s", now, actions)
        gone_for_s = (now.unix_ns - engine.since_unix_ns) / 1e9
        if engine.session is None and gone_for_s > self.settings.forget_s:
            del self.engines[engine.engine_id]

    def _advance(self, now: Now, actions: list[Action]) -> None:
        """Move the activation on: from prefetching to swapping to its end."""
        activation = self.activation
        if activation is None:
            return
        target = activation.publication_id
        late = now.monotonic_s >= activation.deadline_s
        if not activation.swapping:
            unready = [e for e in self._waited(activation) if not e.has(target)]
            enough = sum(e.has(target) for e in self.engines.values()) >= activation.min_engines
            if enough and (late or now.monotonic_s >= self._prefetch_deadline_s(activation)):
                self._quarantine_late(unready, activation, now, actions)
                unready = []
            activation.swapping = enough and not unready
        serving = sum(self._complete(e, activation) for e in self.engines.values())
        pending = [e for e in self._waited(activation) if not self._complete(e, activation)]
        if serving >= activation.min_engines and activation.swapping and not pending:
            self._end(now, actions)
        elif late:
            self._quarantine_late([e for e in pending if e.in_flight is not None], activation, now, actions)
            wanted = f"{activation.min_engines} engines"
            enough = serving >= activation.min_engines and activation.swapping
            self._end(now, actions, "" if enough else f"{serving} of {wanted} serve it after {self._age(now):g} s")

    def _end(self, now: Now, actions: list[Action], error: str = "") -> None:
        activation, self.activation = self.activation, None
        if activation is None:
            return
        version = self.versions[activation.publication_id]
        if not error:
            self._make_active(version, now)
        elif version.publication_id != self.active:
            version.state = VersionState.FAILED
        serving = [e for e in self.engines.values() if e.serves(version.publication_id)]
        pauses = [e.pause_s for e in serving if e.engine_id in activation.swapped]
        faults = [f"{e.engine_id}: {e.last_error}" for e in self.engines.values() if e.quarantined]
        outcome = Outcome(
            ok=not error,
            engines=len(serving),
            quarantined=len(activation.quarantined),
            total_s=now.monotonic_s - activation.began_s,
            pause_s=max(pauses, default=0.0),
            error="; ".join([error, *faults]) if error else "",
        )
        for operation_id in activation.operation_ids:
            self.outcomes[operation_id] = outcome
        while len(self.outcomes) > _OUTCOMES_KEPT:
            del self.outcomes[next(iter(self.outcomes))]
        actions.append(Ended(tuple(activation.operation_ids), outcome))

    def _make_active(self, version: Version, now: Now) -> None:
        if self.active != version.publication_id:
            version.active_unix_ns = now.unix_ns
        self.active = version.publication_id
        for other in self.versions.values():
            if other.publication_id < self.active and other.state is VersionState.PREPARED:
                other.state = VersionState.RETIRED
            if other.state is VersionState.ACTIVE:
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
        elif activation and activation.check_equal and engine.checked_by != activation.operation_id:
            if engine.held is not None and activation.swapping:
                self._order(engine, OrderKind.CHECK, engine.held, now, actions)
        elif not engine.quarantined and (unwanted := engine.maps - {engine.held}):
            self._order(engine, OrderKind.DROP, min(unwanted), now, actions)

    def _order(
        self, engine: Engine, kind: OrderKind, publication_id: int, now: Now, actions: list[Action], reason: str = ""
    ) -> None:
        if engine.session is None:
            return
        order = Order(engine.next_order_id, kind, publication_id, reason)
        engine.next_order_id += 1
        actions.append(Send(engine.engine_id, engine.session, order))
        if kind is OrderKind.QUARANTINE:
            return
        deadline_s = now.monotonic_s + self.settings.load_deadline_s
        activation = self.activation
        if activation is not None and engine.engine_id in activation.waited_for and kind is not OrderKind.DROP:
            deadline_s = activation.deadline_s
        engine.in_flight = InFlight(order, deadline_s, deadline_s - now.monotonic_s)
        if kind is OrderKind.PREFETCH:
            engine.verified = None
            engine.maps.add(publication_id)

    def _done(self, engine: Engine, order: Order, elapsed_s: float, pause_s: float, now: Now) -> None:
        if order.kind is OrderKind.PREFETCH:
            engine.verified, engine.prefetch_s = order.publication_id, elapsed_s
        elif order.kind is OrderKind.SWAP:
            engine.held, engine.verified, engine.pause_s = order.publication_id, None, pause_s
            engine.quarantined, engine.last_error, engine.failures = False, "", 0
            engine.since_unix_ns = now.unix_ns
            if self.activation is not None and order.publication_id == self.activation.publication_id:
                self.activation.swapped.add(engine.engine_id)
        elif order.kind is OrderKind.CHECK and self.activation is not None:
            engine.checked_by = self.activation.operation_id

    def _quarantine(self, engine: Engine, reason: str, now: Now, actions: list[Action]) -> None:
        """Out of routing: nothing it holds counts any more, and its bytes are not to be relied upon nor rewritten."""
        settings = self.settings
        engine.quarantined, engine.last_error = True, reason
        engine.held = engine.verified = None
        engine.retry_at_s = now.monotonic_s + min(settings.first_retry_s * 2**engine.failures, settings.last_retry_s)
        engine.failures += 1
        engine.since_unix_ns = now.unix_ns
        if self.activation is not None:
            self.activation.waited_for.discard(engine.engine_id)
            self.activation.quarantined.add(engine.engine_id)
        self._order(engine, OrderKind.QUARANTINE, 0, now, actions, reason)
        actions.append(EngineChanged(engine.engine_id))

    def _quarantine_late(
        self, engines: Iterable[Engine], activation: Activation, now: Now, actions: list[Action]
    ) -> None:
        for engine in engines:
            if engine.in_flight is not None:
                engine.in_flight.expired = True
            label = self._label(activation.publication_id)
            self._quarantine(engine, f"did not bring {label} in within {self._age(now):g} s", now, actions)

    def _lose(self, engine: Engine, now: Now, actions: list[Action]) -> None:
        """Its subscription is gone. With an order open, or while an activation counts on it, that is a failure."""
        busy = engine.in_flight is not None and engine.in_flight.order.kind is not OrderKind.DROP
        counted_on = self.activation is not None and engine.engine_id in self.activation.waited_for
        for publication_id in set(engine.maps):
            self._let_go(engine, publication_id, clean=False)
        engine.session = engine.in_flight = engine.verified = None
        if (busy or counted_on) and not engine.quarantined:
            self._quarantine(engine, "its subscription ended during an update", now, actions)
        engine.since_unix_ns = now.unix_ns
        engine.held = None

    def _let_go(self, engine: Engine, publication_id: int, clean: bool) -> None:
        engine.maps.discard(publication_id)
        if engine.verified == publication_id:
            engine.verified = None
        version = self.versions.get(publication_id)
        if version is not None and not clean:
            version.reusable = False

    def _collect(self, actions: list[Action]) -> None:
        """Free what nobody needs.

        A retired version goes once it is below the lowest that any engine holds or is about to load; one that failed or
        was given up, as soon as no engine has it and a newer one exists.
        """
        needed = {p for p in (self.active, self.target) if p is not None}
        for engine in self.engines.values():
            if engine.session is not None:
                needed |= {p for p in (engine.held, engine.verified) if p is not None}
                needed |= engine.maps if not engine.quarantined else set()
                if engine.in_flight is not None and not engine.in_flight.expired:
                    needed.add(engine.in_flight.order.publication_id)
        lowest, newest = min(needed, default=self._next_publication_id), max(self.versions, default=0)
        for publication_id, version in list(self.versions.items()):
            retired = version.state is VersionState.RETIRED and publication_id < lowest
            failed = version.state is VersionState.FAILED and publication_id < newest
            if publication_id not in needed and (retired or failed):
                mapped = any(publication_id in e.maps for e in self.engines.values())
                actions.append(Free(publication_id, version.reusable and not mapped))
                del self.versions[publication_id]

    # -- small parts --------------------------------------------------------------------------------------------------

    def _identify(self, number: int | None, checksum: bytes) -> int | None:
        """The newest publication with that number and manifest."""
        if number is None or not checksum:
            return None
        found = [v.publication_id for v in self.versions.values() if v.number == number and v.checksum == checksum]
        return max(found, default=None)

    def _waited(self, activation: Activation) -> list[Engine]:
        return [self.engines[engine_id] for engine_id in activation.waited_for]

    def _complete(self, engine: Engine, activation: Activation) -> bool:
        checked = not activation.check_equal or engine.checked_by == activation.operation_id
        return engine.serves(activation.publication_id) and checked

    def _prefetch_deadline_s(self, activation: Activation) -> float:
        """Half of the time, so that those that have the bytes still get to swap when one engine is stuck."""
        return (activation.began_s + activation.deadline_s) / 2

    def _age(self, now: Now) -> float:
        return now.monotonic_s - self.activation.began_s if self.activation is not None else 0.0

    def _label(self, publication_id: int) -> str:
        version = self.versions.get(publication_id)
        return "a freed version" if version is None else f"version {version.number}"

    # -- what survives a restart --------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Everything that must survive, JSON-able. An activation does not: its caller repeats it."""
        return {
            "next_publication_id": self._next_publication_id,
            "active": self.active,
            "versions": [
                {
                    "publication_id": v.publication_id,
                    "number": v.number,
                    "nbytes": v.nbytes,
                    "state": ("PREPARED" if v.state is VersionState.ACTIVATING else v.state.value),
                    "checksum": v.checksum.hex(),
                    "active_unix_ns": v.active_unix_ns,
                }
                for v in self.versions.values()
            ],
            "quarantined": {e.engine_id: e.last_error for e in self.engines.values() if e.quarantined},
            "outcomes": {name: dataclasses.asdict(outcome) for name, outcome in self.outcomes.items()},
        }

    @classmethod
    def restore(cls, snapshot: dict[str, Any], now: Now, settings: Settings | None = None) -> Publication:
        """The state machine that made the snapshot; engines are to subscribe anew."""
        self = cls(settings)
        self._next_publication_id, self.active = snapshot["next_publication_id"], snapshot["active"]
        for kept in snapshot["versions"]:
            state, checksum = VersionState(kept["state"]), bytes.fromhex(kept["checksum"])
            version = Version(**{**kept, "state": state, "checksum": checksum}, reusable=False)
            self.versions[version.publication_id] = version
        for engine_id, error in snapshot["quarantined"].items():
            engine = Engine(engine_id, quarantined=True, last_error=error, since_unix_ns=now.unix_ns)
            self.engines[engine_id] = engine
        self.outcomes = {name: Outcome(**outcome) for name, outcome in snapshot["outcomes"].items()}
        return self

    def forget(self, publication_id: int, now: Now) -> list[Action]:
        """A publication's bytes were lost (with the machine's memory, or by another's hand)."""
        self.versions.pop(publication_id, None)
        if self.active == publication_id:
            self.active = None
        return self._settle(now)
