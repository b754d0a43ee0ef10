"""Ends a wait that lasts too long, for waits of which there are thousands a second: with one timer for all of them."""

from __future__ import annotations

import asyncio
from types import TracebackType


class SilenceWatch:
    """As a context manager around a wait, raises TimeoutError after `limit_s` seconds; for one wait at a time.

    Like `asyncio.timeout`, without a timer that is set and cancelled for each wait.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._since_s: float | None = None
        self._task: asyncio.Task[object] | None = None
        self._cancelled_before = 0
        self._expired = False
        self._timer = self._loop.call_later(limit_s, self._look)

    def close(self) -> None:
        """Watch no more."""
        self._timer.cancel()

    def __enter__(self) -> None:
        """Begin a wait of the current task."""
        self._task = asyncio.current_task()
        assert self._task is not None, "waits are in tasks"
        self._cancelled_before = self._task.cancelling()
        self._since_s = self._loop.time()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._since_s = None
        if self._expired and self._task is not None:
            self._expired = False
            if self._task.uncancel() <= self._cancelled_before and kind is asyncio.CancelledError:
                raise TimeoutError from error

    def _look(self) -> None:
        """Cancel a wait whose time is up; else look again when it may be."""
        left_s = self._limit_s if self._since_s is None else self._since_s + self._limit_s - self._loop.time()
        if left_s <= 0 and self._task is not None:
            self._expired, left_s = True, self._limit_s
            self._task.cancel()
        self._timer = self._loop.call_later(left_s, self._look)
