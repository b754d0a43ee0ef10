"""What the publication state machine remembers, and what it tells its caller to do."""

from __future__ import annotations

import dataclasses
import enum


class VersionState(enum.Enum):
    """Life of a version; the values are the names in weightsync.proto."""

    ALLOCATED = "ALLOCATED"
    PREPARED = "PREPARED"
    ACTIVATING = "ACTIVATING"
    ACTIVE = "ACTIVE"
    RETIRED = "RETIRED"
    FAILED = "FAILED"


class EngineState(enum.Enum):
    """What an engine is good for; the values are the names in weightsync.proto."""

    EMPTY = "EMPTY"
    SERVING = "SERVING"
    PREFETCHED = "PREFETCHED"
    QUARANTINED = "QUARANTINED"


class OrderKind(enum.Enum):
    """What an engine can be told to do; each but QUARANTINE is answered."""

    PREFETCH = "prefetch"
    SWAP = "swap"
    CHECK = "check"
    DROP = "drop"
    QUARANTINE = "quarantine"


@dataclasses.dataclass(frozen=True, slots=True)
class Now:
    """The caller's clocks at an event."""

    monotonic_s: float
    """For deadlines."""
    unix_ns: int
    """For people."""


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
    lease_s: float = 300.0
    """How long an engine that hears nothing of the service may go on serving."""


@dataclasses.dataclass(slots=True)
class Version:
    """One publication. A number can be published again (after a resume from an older checkpoint); an id never is."""

    publication_id: int
    number: int
    nbytes: int
    state: VersionState = VersionState.ALLOCATED
    checksum: bytes = b""
    """Of its manifest; empty before PREPARED."""
    active_unix_ns: int = 0
    reusable: bool = True
    """Whether its memory may be rewritten once freed: false as soon as someone may map it without our knowing."""
    written_bytes: int = 0
    """What the trainer wrote for it, all transports together."""
    stage_s: dict[str, float] = dataclasses.field(default_factory=dict)
    """How long the trainer took over each stage."""


@dataclasses.dataclass(frozen=True, slots=True)
class Order:
    """An order to an engine; `publication_id` 0 for a quarantine, which concerns none."""

    order_id: int
    kind: OrderKind
    publication_id: int = 0
    number: int = 0
    """Version number of the publication."""
    reason: str = ""


@dataclasses.dataclass(slots=True)
class InFlight:
    """An order that an engine has not answered yet."""

    order: Order
    deadline_s: float
    allowed_s: float
    expired: bool = False
    """Past its deadline: an answer earns nothing, but the engine gets no other order before it."""


@dataclasses.dataclass(slots=True)
class Engine:
    """One engine of one stream."""

    engine_id: str
    session: int | None = None
    """Its subscription; None while it has none."""
    held: int | None = None
    """Publication it serves, by its own word."""
    verified: int | None = None
    """Publication it has prefetched and verified."""
    checked_by: str = ""
    """Activation for which it has compared its bytes."""
    quarantined: bool = False
    last_error: str = ""
    failures: int = 0
    """Quarantines since the last successful swap, a count."""
    retry_at_s: float = 0.0
    """When a quarantined engine gets its next full load."""
    in_flight: InFlight | None = None
    next_order_id: int = 1
    maps: dict[int, int] = dataclasses.field(default_factory=dict)
    """Publications whose bytes it may hold on to, with their version numbers."""
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


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """How an activation ended; times in seconds."""

    publication_id: int
    ok: bool
    engines: int
    quarantined: int
    total_s: float
    pause_s: float
    error: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Send:
    """Send an order on a subscription."""

    engine_id: str
    session: int
    order: Order


@dataclasses.dataclass(frozen=True, slots=True)
class Free:
    """Free a publication's bytes; keep the memory for the next one only if `reusable`."""

    publication_id: int
    reusable: bool


@dataclasses.dataclass(frozen=True, slots=True)
class EngineChanged:
    """Tell whoever watches that an engine has reached another state."""

    engine_id: str


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """Tell whoever waits for one of these operations how it ended."""

    operation_ids: tuple[str, ...]
    outcome: Outcome


@dataclasses.dataclass(frozen=True, slots=True)
class Disconnect:
    """End a subscription that another one of the same engine has replaced."""

    engine_id: str
    session: int


Action = Send | Free | EngineChanged | Ended | Disconnect


class Refused(Exception):
    """The event is not possible in this state; nothing changed."""


class UnknownVersion(Refused):
    """No such version."""
