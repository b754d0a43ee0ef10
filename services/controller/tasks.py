"""Tasks that end with the block that needs them, and signals between tasks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection
from typing import Any


@contextlib.asynccontextmanager
async def cancelled_at_end(*tasks: asyncio.Task[Any]) -> AsyncIterator[None]:
    """Cancel the tasks that still run at the end of the block, and wait until they have ended."""
    try:
        yield
    finally:
        await cancel(tasks)


async def cancel(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel tasks and return once all have ended, however they ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class ChangeSignal:
    """Wakes every task that waits for a change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wake whoever waits now."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, timeout_s: float | None = None) -> None:
        """Return at the next change, or after the timeout."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
