"""Time as the publication state machine sees it: its caller's clocks, and how long things may take."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Now:
    """The caller's clocks at an event."""

    monotonic_s: float
    """For deadlines."""
    unix_ns: int
    """For people."""


@dataclasses.dataclass(frozen=True, slots=True)
class PublicationLimits:
    """Times in seconds."""

    load_deadline_s: float = 120.0
    """How long an engine may take over one order outside an activation (catching up, discarding bytes)."""
    first_retry_s: float = 5.0
    """How long a quarantined engine waits for its next full load; doubles with each failure."""
    last_retry_s: float = 120.0
    """Longest wait of a quarantined engine for its next full load."""
    forget_s: float = 3600.0
    """How long a quarantined engine that has disconnected is remembered."""
    serving_lease_s: float = 300.0
    """How long an engine may go on serving without hearing from the service."""
