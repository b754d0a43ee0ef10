"""Requests of an engine: those that a server has and those that wait for one."""

from __future__ import annotations

import asyncio
import dataclasses
import time

from miles.services.rollout.engines.base import GenerationRequest
from miles.services.rollout.engines.sglang.server.replica import Replica


@dataclasses.dataclass(slots=True)
class ActiveRequest:
    """One request from the moment it comes in."""

    request: GenerationRequest
    rid: str
    """Id on the server: no other id begins with it, because SGLang aborts whatever begins with the id it is told."""
    replica: Replica | None = None
    """The server that has it; None while it waits."""
    aborted: bool = False


class BusyClock:
    """How long there was something to do."""

    def __init__(self) -> None:
        self._total_s = 0.0
        self._since: float | None = None

    def set(self, busy: bool) -> None:
        """There is something to do from now on, or nothing any more."""
        now = time.monotonic()
        if busy and self._since is None:
            self._since = now
        elif not busy and self._since is not None:
            self._total_s += now - self._since
            self._since = None

    @property
    def seconds(self) -> float:
        """In all, up to now."""
        running = 0.0 if self._since is None else time.monotonic() - self._since
        return self._total_s + running


class Signal:
    """Wakes everyone who waits for a change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def fire(self) -> None:
        """Something changed."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        """Return at the next change."""
        await self._event.wait()
