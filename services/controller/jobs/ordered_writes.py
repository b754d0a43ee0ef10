"""Writes that are made one after another, in the order in which they were asked for, while the caller may go on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

Write = Callable[[], Awaitable[None]]
_MANY = 8


class OrderedWrites:
    """A write begins when the one before has ended, well or not; one that has begun is never cancelled."""

    def __init__(self) -> None:
        self._last: asyncio.Task[None] | None = None
        self._waiting: set[asyncio.Task[None]] = set()
        self._error: Exception | None = None
        """Of the first write that failed with nobody waiting for it."""

    async def now(self, write: Write) -> None:
        """Write, and raise what the write raises."""
        await asyncio.shield(self._add(write))

    def later(self, write: Write) -> None:
        """Write while the caller goes on; `check` and `finish` raise what the write raises."""
        self._add(write).add_done_callback(self._note_error)

    async def check(self) -> None:
        """Raise the first error of `later`, once. Waits only while many writes are left, which is seldom."""
        while len(self._waiting) > _MANY:
            await asyncio.wait(self._waiting, return_when=asyncio.FIRST_COMPLETED)
        self._raise_noted()

    async def finish(self) -> None:
        """Return once everything is written; raise the first error of `later`, once."""
        await self._settled()
        self._raise_noted()

    async def settle(self) -> None:
        """Return once everything is written or has failed, for a caller who ends for another cause: the log has it."""
        await self._settled()
        self._error = None

    async def _settled(self) -> None:
        if self._last is not None:
            await asyncio.wait({self._last})
            await asyncio.sleep(0)  # the callback that notes its error was scheduled before this task

    def _raise_noted(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _add(self, write: Write) -> asyncio.Task[None]:
        self._last = asyncio.create_task(_after(self._last, write))
        self._waiting.add(self._last)
        self._last.add_done_callback(self._waiting.discard)
        return self._last

    def _note_error(self, task: asyncio.Task[None]) -> None:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            logger.warning("what was to be recorded could not be written: %s: %s", type(error).__name__, error)
            self._error = self._error or error


async def _after(before: asyncio.Task[None] | None, write: Write) -> None:
    if before is not None and not before.done():
        await asyncio.wait({before})
    await write()
