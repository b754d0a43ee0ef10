"""Tasks that never outlive the block that needs them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any


@contextlib.asynccontextmanager
async def cancelled_on_exit(*tasks: asyncio.Task[Any]) -> AsyncIterator[None]:
    """Cancel the tasks when the block ends and wait until they are done; their own errors are not raised."""
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
