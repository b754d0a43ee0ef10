"""Errors of prompt sets."""

from __future__ import annotations

MAX_LISTED = 10


class DataError(ValueError):
    """A prompt set cannot be used; the message names the place of the fault and what is allowed."""


class Faults:
    """Collects the faults of a file, to report them all at once."""

    def __init__(self) -> None:
        self._listed: list[str] = []
        self._count = 0

    def add(self, fault: str) -> None:
        """Add a fault; beyond the first few only the count is kept."""
        self._count += 1
        if len(self._listed) < MAX_LISTED:
            self._listed.append(fault)

    def check(self) -> None:
        """Raise DataError if there is any fault."""
        if self._count:
            more = [f"... and {self._count - MAX_LISTED} more"] if self._count > MAX_LISTED else []
            raise DataError("\n".join(self._listed + more))
