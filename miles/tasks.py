"""Asyncio tasks that must not outlive the code that started them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any


@contextlib.asynccontextmanager
async def cancelled_at_end(*tasks: asyncio.Task[Any]) -> AsyncIterator[None]:
    """Cancel the tasks that still run at the end of the block, and wait until they have ended."""
    try:
        yield
    finally:
        await cancel(*tasks)


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and return once all have ended; their errors are not raised."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
