"""A configuration that was checked to be planned."""

from __future__ import annotations

import dataclasses

from miles.config.job import JobConfig
from miles.config.notes import Note
from miles.config.schema.faults import Fault
from miles.placement.nodes import Cluster


@dataclasses.dataclass(frozen=True, slots=True)
class RunPlan:
    """What is planned, and for which machines."""

    config: JobConfig
    """Resolved for a device."""
    assumed: Cluster | None = None
    """Instead of this machine."""
    missing: tuple[Fault, ...] = ()
    """What a run needs besides."""
    chosen: tuple[str, ...] = ()
    """What the machine decided, each with the reason."""
    notes: tuple[Note, ...] = ()
    """What becomes of settings that change nothing, or less than they seem to."""
