"""Asyncio tasks that must not outlive the code that started them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import Any


@contextlib.asynccontextmanager
async def cancelled_at_end(*tasks: asyncio.Task[Any]) -> AsyncIterator[None]:
    """Cancel the tasks that still run at the end of the block, and wait until they have ended."""
    try:
        yield
    finally:
        await cancel(*tasks)


async def until_end(end: Awaitable[object], *tasks: asyncio.Task[Any]) -> None:
    """Wait for the end of a service, which is not cancelled with this; raise the error of a task that fails before.

    A task that ends without an error is not waited for.
    """
    ending = asyncio.ensure_future(end)
    running: set[asyncio.Future[Any]] = {ending, *tasks}
    while not ending.done():
        ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for each in ended:
            each.result()


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and return once all have ended and what was to be called at their end has been.

    Their errors are not raised.
    """
    for task in tasks:
        task.cancel()
        if task.done() and not task.cancelled():
            task.exception()  # retrieved, so that asyncio does not report it
    if all(task.done() for task in tasks):
        await asyncio.sleep(0)  # the callbacks of one that has just ended are still to run
    else:
        await asyncio.gather(*tasks, return_exceptions=True)
