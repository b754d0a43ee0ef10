"""Publication of one stream of weights: which engine has which version, and what has to happen next.

A pure state machine: events in, actions out, no I/O and no clock of its own. Every event returns actions that the
caller carries out in order. The rule behind it: each engine is led to the *target* (the version being activated, else
the active one) by prefetch, then swap, one order at a time.

    ALLOCATED -> PREPARED -> ACTIVATING -> ACTIVE -> RETIRED
                                 `-> FAILED (the active version stays active, and engines are led back to it)

During an activation no engine swaps before every engine has verified the bytes or is quarantined, and at least
`min_engines` have: an activation that cannot succeed changes no engine. It fails at once, and for good, when every
engine refuses the version: their model cannot take it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from miles.services.weightsync import garbage
from miles.services.weightsync import version as version_states
from miles.services.weightsync.actions import Action, Disconnect, Ended, EngineChanged, Free, Outcome, Send
from miles.services.weightsync.activation import Activation, able_to_load, keep_outcome
from miles.services.weightsync.engine import Engine, InFlight, Order, OrderKind
from miles.services.weightsync.orders import next_order
from miles.services.weightsync.timing import Now, PublicationLimits
from miles.services.weightsync.version import Version, VersionState


class Publication:
    """The state of one stream of one job."""

    def __init__(self, limits: PublicationLimits | None = None) -> None:
        self.limits = limits or PublicationLimits()
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
        """The trainer wants room for a version. What it allocated before and never prepared fails."""
        version_states.fail_unprepared(self.versions)
        version = Version(self.next_publication_id, number, nbytes)
        self.next_publication_id += 1
        self.versions[version.publication_id] = version
        return version, self._step(now)

    def discard(self, publication_id: int, now: Now) -> list[Action]:
        """A publication has no bytes: there was no room for them, or they were lost with the machine's memory."""
        self.versions.pop(publication_id, None)
        if self.active == publication_id:
            self.active = None
        return self._step(now)

    def prepare(
        self, publication_id: int, checksum: bytes, now: Now, out_of_reach: Collection[str] = ()
    ) -> list[Action]:
        """The trainer has written every byte of an allocation. Idempotent; Refused for another manifest.

        `out_of_reach`: engines that cannot get them; they wait for the next version.
        """
        for engine_id in out_of_reach:
            self.engines[engine_id].out_of_reach.add(publication_id)
        return self._step(now) if version_states.prepare(self.versions, publication_id, checksum) else []

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
        engines; one for another publication ends it: the latest request counts.
        """
        version = self.find(number)
        past = self.outcomes.get(operation_id)
        if past is not None and past.publication_id == version.publication_id:
            return []
        if self.activation is not None and self.activation.publication_id == version.publication_id:
            self.activation.join(operation_id, wait_for)
            return self._step(now)
        actions: list[Action] = []
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
            waited_for=able_to_load(version.publication_id, self.engines, wait_for),
        )
        if version.publication_id != self.active:
            version.state = VersionState.ACTIVATING
        return actions + self._step(now)

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

    def connect(
        self,
        engine_id: str,
        session: int,
        number: int | None,
        checksum: bytes,
        now: Now,
        out_of_reach: Collection[int] = (),
    ) -> list[Action]:
        """An engine subscribed and reports what it serves. A version that is unknown here counts as nothing.

        `out_of_reach`: publications whose bytes it cannot get.
        """
        actions: list[Action] = []
        engine = self.engines.setdefault(engine_id, Engine(engine_id))
        if engine.session is not None:
            actions.append(Disconnect(engine_id, engine.session))
            self._detach(engine, now, actions)
        held = version_states.identify(self.versions, number, checksum)
        engine.attach(session, None if held is None else (held.publication_id, held.number), now, out_of_reach)
        if engine.quarantined:
            self._send(engine, OrderKind.QUARANTINE, None, actions, engine.last_error)
        actions.append(EngineChanged(engine_id))
        return actions + self._step(now)

    def disconnect(self, engine_id: str, session: int, now: Now) -> list[Action]:
        """A subscription ended. The engine may live on and serve, so its bytes must not be rewritten."""
        engine = self.engines.get(engine_id)
        if engine is None or engine.session != session:
            return []
        actions: list[Action] = []
        self._detach(engine, now, actions)
        if not engine.quarantined:
            del self.engines[engine_id]
        return actions + self._step(now)

    def report(
        self,
        engine_id: str,
        session: int,
        order_id: int,
        error: str | None,
        elapsed_s: float,
        pause_s: float,
        now: Now,
        refused: bool = False,
    ) -> list[Action]:
        """An engine answered an order; `error` None means done. Only the answer to its open order counts.

        `refused`: its model cannot take the version, so that it is not ordered to load it again while it is attached.
        """
        engine = self.engines.get(engine_id)
        if engine is None or (flight := engine.answered(session, order_id)) is None:
            return []
        actions: list[Action] = []
        if error is None:
            engine.stage_s[flight.order.kind.value] = elapsed_s
        if flight.order.kind is OrderKind.DISCARD:
            self._forget_bytes(engine, flight.order.publication_id, clean=error is None)
        elif flight.expired and not refused:
            pass  # it is quarantined already, and starts over
        elif error is not None:
            engine.refused = flight.order.publication_id if refused else engine.refused
            self._quarantine(engine, f"{flight.order}: {error}", now, actions)
        elif flight.order.publication_id in self.versions:
            self._complete(engine, flight.order, pause_s, now)
            actions.append(EngineChanged(engine_id))
        return actions + self._step(now)

    def tick(self, now: Now) -> list[Action]:
        """Time has passed; call at the latest at `wake_at_s`."""
        return self._step(now)

    # -- questions ----------------------------------------------------------------------------------------------------

    @property
    def target(self) -> int | None:
        """The publication that every engine is being led to."""
        return self.active if self.activation is None else self.activation.publication_id

    def find(self, number: int) -> Version:
        """The newest complete publication of a version number; UnknownVersion or Refused when there is none."""
        return version_states.find(self.versions, number)

    def wake_at_s(self) -> float | None:
        """When `tick` is due at the latest, on the monotonic clock; None when only an event can change anything."""
        times = [] if self.activation is None else [self.activation.prefetch_deadline_s, self.activation.deadline_s]
        times += [time for engine in self.engines.values() if (time := engine.due_s()) is not None]
        return min((time for time in times if time > self._now_s), default=None)

    # -- how state follows events -------------------------------------------------------------------------------------

    def _step(self, now: Now) -> list[Action]:
        """Apply deadlines, advance the activation, give idle engines their next order, free what nobody needs."""
        self._now_s = now.monotonic_s
        actions: list[Action] = []
        for engine in list(self.engines.values()):
            if late := engine.expire(now):
                self._quarantine(engine, late, now, actions)
            if engine.session is None and now.unix_ns - engine.since_unix_ns > self.limits.forget_s * 1e9:
                del self.engines[engine.engine_id]
        self._advance(now, actions)
        for engine in self.engines.values():
            order = next_order(engine, self.target, self.activation, now)
            if order is not None:
                self._order(engine, *order, now, actions)
        keep = garbage.needed(self.engines.values(), (self.active, self.target))
        for version in garbage.unneeded(self.versions, keep):
            self._free(version.publication_id, actions, version.reusable)
        return actions

    def _advance(self, now: Now, actions: list[Action]) -> None:
        """Move the activation on: from prefetching to swapping to its end."""
        activation = self.activation
        if activation is None:
            return
        required = activation.required(self.engines)
        if not activation.swapping and activation.ready(self.engines) >= required:
            if now.monotonic_s >= activation.prefetch_deadline_s:
                self._quarantine_late(activation.without_bytes(self.engines), now, actions)
            activation.swapping = not activation.without_bytes(self.engines)
        late = now.monotonic_s >= activation.deadline_s
        if late:
            # An idle engine waited for others, and is not to blame.
            pending = [engine for engine in activation.pending(self.engines) if engine.in_flight is not None]
            self._quarantine_late(pending, now, actions)
        serving = activation.serving(self.engines)
        enough = activation.swapping and serving >= required
        if activation.refused_by_all(self.engines, late):
            self._end(now, actions, "no engine can take it", refused=True)
        elif enough and (late or not activation.pending(self.engines)):
            self._end(now, actions)
        elif activation.out_of_reach_of_all(self.engines):
            self._end(now, actions, "no engine can open the GPU memory that it is in; publish it again")
        elif late:
            allowed_s = activation.deadline_s - activation.began_s
            self._end(now, actions, f"{serving} of {required} engines serve it after {allowed_s:g} s")

    def _end(self, now: Now, actions: list[Action], error: str = "", refused: bool = False) -> None:
        """End the activation under way, if any; an error is why it failed."""
        activation, self.activation = self.activation, None
        if activation is None:
            return
        version = self.versions[activation.publication_id]
        if not error:
            version_states.make_active(self.versions, version, self.active, now)
            self.active = version.publication_id
        elif version.publication_id != self.active:
            version.state = VersionState.FAILED
        outcome = activation.outcome(self.engines, now.monotonic_s, error, refused)
        self.outcomes = keep_outcome(self.outcomes, activation.operation_ids, outcome)
        actions.append(Ended(tuple(activation.operation_ids), outcome))

    def _order(self, engine: Engine, kind: OrderKind, publication_id: int, now: Now, actions: list[Action]) -> None:
        """Send an order that is to be answered."""
        if kind is OrderKind.PREFETCH:
            engine.verified = None
            engine.maps[publication_id] = self.versions[publication_id].number
        deadline_s = now.monotonic_s + self.limits.load_deadline_s
        if self.activation is not None and engine.engine_id in self.activation.waited_for:
            deadline_s = self.activation.deadline_s
        order = self._send(engine, kind, publication_id, actions)
        engine.in_flight = InFlight(order, deadline_s, deadline_s - now.monotonic_s)

    def _send(
        self, engine: Engine, kind: OrderKind, publication_id: int | None, actions: list[Action], reason: str = ""
    ) -> Order:
        order = engine.make_order(kind, publication_id, reason)
        if engine.session is not None:
            actions.append(Send(engine.engine_id, engine.session, order))
        return order

    def _complete(self, engine: Engine, order: Order, pause_s: float, now: Now) -> None:
        """Credit an order that was carried out in time."""
        if order.kind is OrderKind.PREFETCH:
            engine.verified = order.publication_id
        elif order.kind is OrderKind.SWAP:
            engine.swapped(order.publication_id, pause_s, now)
            if self.activation is not None and order.publication_id == self.activation.publication_id:
                self.activation.swapped.add(engine.engine_id)
        elif order.kind is OrderKind.CHECK and self.activation is not None:
            engine.checked_by = self.activation.operation_id

    def _quarantine(self, engine: Engine, reason: str, now: Now, actions: list[Action]) -> None:
        engine.quarantine(reason, now, self.limits)
        if self.activation is not None:
            self.activation.waited_for.discard(engine.engine_id)
            self.activation.quarantined.add(engine.engine_id)
        self._send(engine, OrderKind.QUARANTINE, None, actions, reason)
        actions.append(EngineChanged(engine.engine_id))

    def _quarantine_late(self, engines: Iterable[Engine], now: Now, actions: list[Action]) -> None:
        for engine in engines:
            self._quarantine(engine, f"it was too slow for the activation: it was {engine.give_up()}", now, actions)

    def _detach(self, engine: Engine, now: Now, actions: list[Action]) -> None:
        """End an engine's subscription: a failure if an order is open or an activation waits for the engine."""
        busy = engine.in_flight is not None and engine.in_flight.order.kind is not OrderKind.DISCARD
        waited_for = self.activation is not None and engine.engine_id in self.activation.waited_for
        for publication_id in list(engine.maps):
            self._forget_bytes(engine, publication_id, clean=False)
        engine.detach(now)
        if (busy or waited_for) and not engine.quarantined:
            self._quarantine(engine, "its subscription ended during an update", now, actions)

    def _forget_bytes(self, engine: Engine, publication_id: int, clean: bool) -> None:
        """An engine no longer needs a publication's bytes; unless that is `clean`, it may still map them."""
        engine.forget(publication_id)
        version = self.versions.get(publication_id)
        if version is not None and not clean:
            version.reusable = False

    def _free(self, publication_id: int, actions: list[Action], reusable: bool) -> None:
        del self.versions[publication_id]
        for engine in self.engines.values():
            engine.out_of_reach.discard(publication_id)
            if publication_id in engine.maps:
                del engine.maps[publication_id]
                reusable = False
        actions.append(Free(publication_id, reusable))
