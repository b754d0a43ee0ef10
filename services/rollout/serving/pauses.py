"""Pauses that hold a lease: idempotent per operation, and expiring to quarantine, never to serving.

A pure state machine: it has no clock of its own and does nothing but decide.
"""

from __future__ import annotations

import collections
import enum

_REMEMBERED = 256
"""Operations of the past that are recognised when they are repeated."""


class PauseRefused(RuntimeError):
    """The pause or resume contradicts what the engine is doing."""


class Step(enum.Enum):
    """What the caller is to do with the engine."""

    NOTHING = "nothing"
    PAUSE = "pause"
    RESUME = "resume"


class Pauses:
    """The one pause an engine may be in."""

    def __init__(self) -> None:
        self.operation_id: str | None = None
        """Operation that holds the engine paused; None while it runs."""
        self.expired = ""
        """Why a pause ended in quarantine; empty otherwise."""
        self._deadline = 0.0
        self._past: collections.deque[str] = collections.deque(maxlen=_REMEMBERED)

    def pause(self, operation_id: str, lease_s: float, now: float) -> Step:
        """An operation asks for a pause of at most `lease_s` seconds. Raises PauseRefused."""
        if not operation_id:
            raise PauseRefused("operation_id is empty; choose one, so that a repetition can be recognised")
        if lease_s <= 0:
            raise PauseRefused(f"the pause {operation_id!r} has a lease of {lease_s:g} s; it must be above 0")
        if operation_id == self.operation_id or operation_id in self._past:
            return Step.NOTHING
        if self.operation_id is not None:
            raise PauseRefused(f"operation {self.operation_id!r} holds the engine paused; resume that first")
        self.operation_id = operation_id
        self._deadline = now + lease_s
        return Step.PAUSE

    def resume(self, operation_id: str) -> Step:
        """The operation ends its pause. Raises PauseRefused."""
        if operation_id == self.operation_id:
            self._end()
            return Step.RESUME
        if self.expired and operation_id in self._past:
            raise PauseRefused(f"{self.expired}; the engine serves again after a verified full load")
        if operation_id in self._past:
            return Step.NOTHING
        holder = "nothing" if self.operation_id is None else f"operation {self.operation_id!r}"
        raise PauseRefused(f"operation {operation_id!r} does not hold the engine paused; {holder} does")

    def tick(self, now: float) -> bool:
        """True once, when the pause has outlived its lease: the engine is to be quarantined."""
        if self.operation_id is None or now < self._deadline:
            return False
        self.expired = f"the pause of operation {self.operation_id!r} outlived its lease"
        self._end()
        return True

    def loaded(self) -> None:
        """A verified full load ends a quarantine."""
        self.expired = ""

    def failed(self) -> None:
        """The engine could not be paused after all."""
        self.operation_id = None

    def _end(self) -> None:
        assert self.operation_id is not None
        self._past.append(self.operation_id)
        self.operation_id = None
