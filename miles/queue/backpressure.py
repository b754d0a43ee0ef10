"""Waiting for room in a full Redis instead of losing what it has no memory for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis.exceptions import OutOfMemoryError, ResponseError

from miles.queue.errors import QueueFull

log = logging.getLogger(__name__)

_T = TypeVar("_T")


def is_out_of_memory(error: ResponseError) -> bool:
    """True for a refusal by `maxmemory` with noeviction, also when it comes out of a script."""
    return isinstance(error, OutOfMemoryError) or "OOM command not allowed" in str(error)


async def when_there_is_room(write: Callable[[], Awaitable[_T]], what: str, nbytes: int, deadline_s: float) -> _T:
    """Do `write`, again and again for as long as Redis refuses it for lack of memory.

    Raises QueueFull after `deadline_s` seconds; every other error at once.
    """
    loop = asyncio.get_running_loop()
    started = loop.time()
    pause_s = 0.05
    while True:
        try:
            return await write()
        except ResponseError as error:
            if not is_out_of_memory(error):
                raise
            waited = loop.time() - started
            if waited >= deadline_s:
                raise QueueFull(
                    f"Redis had no memory for {what} ({nbytes} bytes) for {waited:.0f} s; raise its maxmemory, "
                    "or let the trainer save checkpoints more often so that it acknowledges groups"
                ) from error
            if pause_s == 0.05:
                log.warning("Redis is full: waiting up to %.0f s for room for %s (%d bytes)", deadline_s, what, nbytes)
        await asyncio.sleep(min(pause_s, max(0.0, deadline_s - (loop.time() - started))))
        pause_s = min(pause_s * 2, 2.0)
