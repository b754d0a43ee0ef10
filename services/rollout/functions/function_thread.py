"""A thread with an event loop for functions of users, so that one that blocks holds up nothing else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

from miles.threads import guard_threads, only_exceptions
from miles.utils.http_utils import close_session

T = TypeVar("T")
_CLOSE_S = 5.0


class FunctionThread:
    """Runs asynchronous functions on an event loop of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        guard_threads(self._loop)
        self._thread = threading.Thread(target=self._loop.run_forever, name="functions of users", daemon=True)
        self._thread.start()

    async def run(self, call: Callable[[], Awaitable[T]]) -> T:
        """Await `call()` there. Cancelling this cancels it, without waiting until it has ended."""

        async def guarded() -> T:
            with only_exceptions():
                return await call()

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(guarded(), self._loop))

    async def close(self) -> None:
        """Cancel what runs and end the thread; one that is blocked by a function is left behind."""
        ended = asyncio.run_coroutine_threadsafe(_end_all(), self._loop)
        await asyncio.wait([asyncio.wrap_future(ended)], timeout=_CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._thread.join, _CLOSE_S)


async def _end_all() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=_CLOSE_S / 2)
    await close_session()
