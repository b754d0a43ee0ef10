"""What the publication state machine asks its caller to do, and how activations end."""

from __future__ import annotations

import dataclasses

from miles.services.weightsync.engine import Order


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
    refused: bool = False
    """Failed for good: no engine is left that could take the version."""


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
    """Notify watchers that an engine has changed state."""

    engine_id: str


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """Notify whoever waits for one of these operations how it ended."""

    operation_ids: tuple[str, ...]
    outcome: Outcome


@dataclasses.dataclass(frozen=True, slots=True)
class Disconnect:
    """End a subscription that another one of the same engine has replaced."""

    engine_id: str
    session: int


Action = Send | Free | EngineChanged | Ended | Disconnect
