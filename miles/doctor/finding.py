"""What a check says: how it is, what was found, and what to change."""

from __future__ import annotations

import dataclasses
import enum


class Status(enum.StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARN = "warn"
    """A run works, but slower, or not for long."""
    FAIL = "fail"
    """A run does not work."""


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One finding of a check."""

    status: Status
    found: str
    change: str = ""
    """The command or flag that mends it; empty when there is nothing to mend."""


def ok(found: str) -> Finding:
    """Return a finding that needs no change."""
    return Finding(Status.OK, found)


def warn(found: str, change: str) -> Finding:
    """Return a finding of something that works badly."""
    return Finding(Status.WARN, found, change)


def fail(found: str, change: str) -> Finding:
    """Return a finding of something that does not work."""
    return Finding(Status.FAIL, found, change)
