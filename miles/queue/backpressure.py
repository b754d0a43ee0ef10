"""Retries writes while Redis is full or unreachable, so that nothing is lost."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis.exceptions import BusyLoadingError, ConnectionError, OutOfMemoryError, ResponseError, TimeoutError

from miles.queue.errors import QueueFull

log = logging.getLogger(__name__)

TRANSIENT = (ConnectionError, TimeoutError, BusyLoadingError)
"""Errors of a Redis that restarts; the client has retried several times by then."""

_FIRST_PAUSE_S = 0.05
_LAST_PAUSE_S = 2.0
_T = TypeVar("_T")


def is_out_of_memory(error: ResponseError) -> bool:
    """Return whether Redis refused a write because of `maxmemory`, also inside a script."""
    return isinstance(error, OutOfMemoryError) or "OOM command not allowed" in str(error)


@dataclasses.dataclass(frozen=True, slots=True)
class WriteWait:
    """A write that Redis does not take now."""

    since_unix_s: float
    deadline_s: float
    error: str
    """Words of its first failure."""


async def until_written(
    write: Callable[[], Awaitable[_T]],
    what: str,
    nbytes: int,
    deadline_s: float,
    waiting: dict[str, WriteWait] | None = None,
) -> _T:
    """Call `write`, which must be idempotent, until it succeeds; retry while Redis is out of memory or unreachable.

    While it waits, `waiting` has an entry for it, under `what`. Raises QueueFull, or the connection's error, after
    `deadline_s` seconds; any other error at once.
    """
    try:
        return await _until_written(write, what, nbytes, deadline_s, {} if waiting is None else waiting)
    finally:
        if waiting is not None:
            waiting.pop(what, None)


async def _until_written(
    write: Callable[[], Awaitable[_T]], what: str, nbytes: int, deadline_s: float, waiting: dict[str, WriteWait]
) -> _T:
    loop = asyncio.get_running_loop()
    started = loop.time()
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            return await write()
        except (ResponseError, *TRANSIENT) as error:
            unreachable = isinstance(error, TRANSIENT)
            if not unreachable and not (isinstance(error, ResponseError) and is_out_of_memory(error)):
                raise
            waited_s = loop.time() - started
            if waited_s >= deadline_s:
                if unreachable:
                    raise
                raise QueueFull(
                    f"Redis had no memory for {what} ({nbytes} bytes) for {waited_s:.0f} s; raise its maxmemory, "
                    "or let the trainer save checkpoints more often so that it acknowledges groups"
                ) from error
            if pause_s == _FIRST_PAUSE_S:
                waiting[what] = WriteWait(time.time(), deadline_s, str(error))
                log.warning("%s (%d bytes) waits up to %.0f s for Redis: %s", what, nbytes, deadline_s, error)
        await asyncio.sleep(min(pause_s, max(0.0, deadline_s - (loop.time() - started))))
        pause_s = min(pause_s * 2, _LAST_PAUSE_S)
