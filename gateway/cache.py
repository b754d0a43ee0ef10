"""A short-lived cache that answers concurrent requests for the same thing with one call."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import math
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclasses.dataclass(slots=True, eq=False)
class _Kept(Generic[T]):
    """A cached answer, or one that is being fetched."""

    answer: asyncio.Future[T]
    made_s: float = 0.0
    successor: asyncio.Future[T] | None = None
    """The answer that will replace it."""


class AnswerCache(Generic[T]):
    """Caches answers for a short time; callers wait for an answer that is being fetched already.

    An ageing answer is renewed in the background while callers still get it. An answer from before `forget` is never
    returned to a later caller. Errors are not cached.
    """

    def __init__(self, keep_s: float, *, renew_s: float = math.inf, size: int = 1024) -> None:
        """Answers are valid for `keep_s` seconds, and renewed when one older than `renew_s` seconds is returned."""
        self._keep_s = keep_s
        self._renew_s = renew_s
        self._size = size
        self._kept: collections.OrderedDict[Hashable, _Kept[T]] = collections.OrderedDict()

    async def get(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> T:
        """Return the answer for a key; call `make` when there is no valid one."""
        kept = self._kept.get(key)
        if kept is not None:
            if not kept.answer.done():
                return await asyncio.shield(kept.answer)
            age_s = time.monotonic() - kept.made_s
            if age_s < self._keep_s:
                if age_s >= self._renew_s and kept.successor is None:
                    self._renew(key, kept, make)
                return kept.answer.result()
            if kept.successor is not None:
                return await asyncio.shield(kept.successor)
        made = self._kept[key] = _Kept(asyncio.ensure_future(make()))
        self._kept.move_to_end(key)
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)
        made.answer.add_done_callback(lambda done: self._store(key, made, done))
        return await asyncio.shield(made.answer)

    def forget(self, key: Hashable) -> None:
        """Remove the answer for a key, so that the next call fetches it again."""
        self._kept.pop(key, None)

    def _renew(self, key: Hashable, kept: _Kept[T], make: Callable[[], Awaitable[T]]) -> None:
        kept.successor = asyncio.ensure_future(make())
        kept.successor.add_done_callback(lambda done: self._store(key, kept, done))

    def _store(self, key: Hashable, kept: _Kept[T], done: asyncio.Future[T]) -> None:
        """Cache an answer or a successor that has been fetched; remove an answer that has failed."""
        failed = done.cancelled() or done.exception() is not None
        kept.successor = None
        if self._kept.get(key) is not kept:
            return
        if not failed:
            self._kept[key] = _Kept(done, time.monotonic())
        elif done is kept.answer:
            del self._kept[key]
