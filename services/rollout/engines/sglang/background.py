"""Calls to servers that run in the background."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

from miles.services.rollout.engines.base import EngineFailed
from miles.services.rollout.engines.sglang.errors import ServerRefused


class BackgroundCalls:
    """Runs calls that nobody waits for. Their failures are ignored: a server that fails is noticed by its probe."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, call: Coroutine[Any, Any, object]) -> None:
        """Run a call."""
        task = asyncio.create_task(_ignoring_failures(call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self) -> None:
        """Cancel the calls that run."""
        for task in list(self._tasks):
            task.cancel()


async def _ignoring_failures(call: Coroutine[Any, Any, object]) -> None:
    with contextlib.suppress(EngineFailed, ServerRefused):
        await call
