"""Pause tokens: idempotent per operation; a token that expires quarantines the engine instead of resuming it.

A pure state machine with no clock of its own and no side effects.
"""

from __future__ import annotations

import collections
import enum

_REMEMBERED = 256
"""Past operations that are recognised when they are repeated."""


class PauseRefused(RuntimeError):
    """The pause or resume contradicts the state that the engine is in."""


class Step(enum.Enum):
    """What the caller must do with the engine."""

    NOTHING = "nothing"
    PAUSE = "pause"
    RESUME = "resume"


class Pauses:
    """The one pause an engine may be in, and the token that holds it: an operation's id and its time to live."""

    def __init__(self) -> None:
        self.operation_id: str | None = None
        """Operation that holds the engine paused; None while it runs."""
        self.expired = ""
        """Why the engine is quarantined, when a token expired; empty otherwise."""
        self._deadline = 0.0
        self._past: collections.deque[str] = collections.deque(maxlen=_REMEMBERED)

    def pause(self, operation_id: str, ttl_s: float, now: float) -> Step:
        """Take the token for an operation, for at most `ttl_s` seconds. Raises PauseRefused."""
        if not operation_id:
            raise PauseRefused("operation_id is empty; choose one, so that a repetition can be recognised")
        if ttl_s <= 0:
            raise PauseRefused(f"the token of pause {operation_id!r} lives for {ttl_s:g} s; it must be above 0")
        if operation_id == self.operation_id or operation_id in self._past:
            return Step.NOTHING
        if self.operation_id is not None:
            raise PauseRefused(f"operation {self.operation_id!r} holds the engine paused; resume that first")
        self.operation_id = operation_id
        self._deadline = now + ttl_s
        return Step.PAUSE

    def resume(self, operation_id: str) -> Step:
        """Return the token. Raises PauseRefused."""
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
        """True once, when the token has expired: the engine must be quarantined."""
        if self.operation_id is None or now < self._deadline:
            return False
        self.expired = f"the pause token of operation {self.operation_id!r} expired"
        self._end()
        return True

    def loaded(self) -> None:
        """Forget an expired token: a verified full load ends the quarantine."""
        self.expired = ""

    def failed(self) -> None:
        """Forget the token that was taken last: the engine could not be paused."""
        self.operation_id = None

    def _end(self) -> None:
        assert self.operation_id is not None
        self._past.append(self.operation_id)
        self.operation_id = None
