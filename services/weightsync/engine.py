"""One engine as the service sees it: what it serves, what it has been ordered to do, and whether it is quarantined."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable

from miles.services.weightsync.timing import Now, PublicationLimits

_MOST_FAILURES = 30
"""Failures counted, so that the time to the next full load stays a finite number."""


class EngineState(enum.Enum):
    """What an engine is good for; the values are the names in weightsync.proto."""

    EMPTY = "EMPTY"
    SERVING = "SERVING"
    PREFETCHED = "PREFETCHED"
    QUARANTINED = "QUARANTINED"


class OrderKind(enum.Enum):
    """What an engine can be ordered to do; each but QUARANTINE is answered."""

    PREFETCH = "prefetch"
    SWAP = "swap"
    CHECK = "check"
    DISCARD = "discard"
    QUARANTINE = "quarantine"


@dataclasses.dataclass(frozen=True, slots=True)
class Order:
    """An order to an engine; `publication_id` 0 for a quarantine, which concerns none."""

    order_id: int
    kind: OrderKind
    publication_id: int = 0
    number: int = 0
    """Version number of the publication."""
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.kind.value} of version {self.number}"


@dataclasses.dataclass(slots=True)
class InFlight:
    """An order that an engine has not answered yet."""

    order: Order
    deadline_s: float
    allowed_s: float
    expired: bool = False
    """Past its deadline: an answer no longer counts, but the engine gets no other order before it."""


@dataclasses.dataclass(slots=True)
class Engine:
    """One engine of one stream."""

    engine_id: str
    session: int | None = None
    """Its subscription; None while it has none."""
    held: int | None = None
    """Publication that it reports to serve."""
    verified: int | None = None
    """Publication that it has prefetched and verified."""
    checked_by: str = ""
    """Activation for which it has compared its bytes."""
    quarantined: bool = False
    last_error: str = ""
    refused: int | None = None
    """Publication that its model cannot take: no retry helps, unless it attaches again, perhaps with another model."""
    out_of_reach: set[int] = dataclasses.field(default_factory=set)
    """Publications whose bytes it cannot get: they were put where the engines of that time could."""
    failures: int = 0
    """Quarantines since the last successful swap, a count."""
    retry_at_s: float = 0.0
    """When a quarantined engine gets its next full load."""
    in_flight: InFlight | None = None
    next_order_id: int = 1
    maps: dict[int, int] = dataclasses.field(default_factory=dict)
    """Publications whose bytes it may still map, with their version numbers."""
    since_unix_ns: int = 0
    stage_s: dict[str, float] = dataclasses.field(default_factory=dict)
    """How long the last order of each kind took, by its name."""
    pause_s: float = 0.0

    @property
    def state(self) -> EngineState:
        """As the wire names it."""
        if self.quarantined:
            return EngineState.QUARANTINED
        if self.verified is not None:
            return EngineState.PREFETCHED
        return EngineState.EMPTY if self.held is None else EngineState.SERVING

    def serves(self, publication_id: int) -> bool:
        """Whether it is in routing with that publication."""
        return self.session is not None and not self.quarantined and self.held == publication_id

    def has(self, publication_id: int) -> bool:
        """Whether it serves the publication or could at once."""
        return self.session is not None and publication_id in (self.held, self.verified)

    def due_s(self) -> float | None:
        """When its order expires or its quarantine's next full load is due, on the monotonic clock; None: never."""
        if self.in_flight is not None:
            return None if self.in_flight.expired else self.in_flight.deadline_s
        return self.retry_at_s if self.quarantined and self.session else None

    def is_prefetching(self, session: int, order_id: int) -> bool:
        """Whether its open order is this one, and one to prefetch."""
        flight = self.in_flight
        if flight is None or self.session != session or flight.order.order_id != order_id:
            return False
        return flight.order.kind is OrderKind.PREFETCH

    def hangs_in_prefetch(self) -> bool:
        """Whether it has not answered an order to prefetch in time."""
        flight = self.in_flight
        return flight is not None and flight.expired and flight.order.kind is OrderKind.PREFETCH

    # -- how it changes -----------------------------------------------------------------------------------------------

    def attach(self, session: int, held: tuple[int, int] | None, now: Now, out_of_reach: Iterable[int] = ()) -> None:
        """Begin a subscription; `held` is what it reports to serve: publication and version number."""
        self.session, self.next_order_id, self.refused = session, 1, None
        self.out_of_reach = set(out_of_reach)
        self.retry_at_s = min(self.retry_at_s, now.monotonic_s)
        self.since_unix_ns = now.unix_ns
        if held is not None:
            publication_id, number = held
            self.maps[publication_id] = number
            self.held = None if self.quarantined else publication_id

    def detach(self, now: Now) -> None:
        """End the subscription. What the engine serves is unknown from here on."""
        self.session = self.in_flight = self.held = self.verified = None
        self.since_unix_ns = now.unix_ns

    def make_order(self, kind: OrderKind, publication_id: int | None, reason: str = "") -> Order:
        """The next order of the subscription; without one, an order that cannot be sent."""
        number = 0 if publication_id is None else self.maps[publication_id]
        order = Order(self.next_order_id, kind, publication_id or 0, number, reason)
        if self.session is not None:
            self.next_order_id += 1
        return order

    def answered(self, session: int, order_id: int) -> InFlight | None:
        """Close the open order if this is the answer to it, and return it."""
        flight = self.in_flight
        if flight is None or self.session != session or flight.order.order_id != order_id:
            return None
        self.in_flight = None
        return flight

    def expire(self, now: Now) -> str:
        """Mark an order whose deadline has passed as expired; return what went wrong, empty when nothing did."""
        flight = self.in_flight
        if flight is None or flight.expired or now.monotonic_s < flight.deadline_s:
            return ""
        flight.expired = True
        return f"no answer to {flight.order} within {flight.allowed_s:g} s"

    def give_up(self) -> str:
        """Mark the open order, if any, as expired; return what the engine was doing."""
        if self.in_flight is None:
            return "idle"
        self.in_flight.expired = True
        return f"busy with {self.in_flight.order}"

    def swapped(self, publication_id: int, pause_s: float, now: Now) -> None:
        """Serve a publication: this ends a quarantine."""
        self.held, self.verified, self.pause_s = publication_id, None, pause_s
        self.quarantined, self.last_error, self.failures, self.refused = False, "", 0, None
        self.since_unix_ns = now.unix_ns

    def quarantine(self, reason: str, now: Now, limits: PublicationLimits) -> None:
        """Take it out of routing: nothing it holds counts any more."""
        self.quarantined, self.last_error = True, reason
        self.held = self.verified = None
        self.retry_at_s = now.monotonic_s + min(limits.first_retry_s * 2**self.failures, limits.last_retry_s)
        self.failures = min(self.failures + 1, _MOST_FAILURES)
        self.since_unix_ns = now.unix_ns

    def forget(self, publication_id: int) -> None:
        """Note that the engine no longer needs a publication's bytes."""
        self.maps.pop(publication_id, None)
        if self.verified == publication_id:
            self.verified = None
