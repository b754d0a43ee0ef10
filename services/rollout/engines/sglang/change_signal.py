"""A signal for tasks that wait until the servers or the requests have changed."""

from __future__ import annotations

import asyncio


class ChangeSignal:
    """Wakes every task that waits for the next change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def fire(self) -> None:
        """Wake all that wait."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        """Return at the next `fire`."""
        await self._event.wait()
