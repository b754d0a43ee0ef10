"""How long an engine may go on serving without hearing from the weightsync service."""

from __future__ import annotations

import asyncio
import time


class ServingLease:
    """A lease that the service renews. All methods run on the event loop."""

    def __init__(self) -> None:
        self.duration_s = 0.0
        """Length of the last renewal, in seconds."""
        self._end_s: float | None = None
        """On the monotonic clock; None before the first renewal and after the lease has expired."""
        self._renewed = asyncio.Event()

    def renew(self, duration_s: float) -> None:
        """Let the lease run for `duration_s` seconds from now."""
        self.duration_s = duration_s
        self._end_s = time.monotonic() + duration_s
        self._renewed.set()

    async def wait_until_expired(self) -> None:
        """Return when the lease expires. It expires once; after that, the next renewal begins a new lease."""
        while self._end_s is None or time.monotonic() < self._end_s:
            if self._end_s is None:
                self._renewed.clear()
                await self._renewed.wait()
            else:
                await asyncio.sleep(self._end_s - time.monotonic())
        self._end_s = None
