"""Answers that many ask for at once, asked for once."""

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
    """An answer, or one in the making."""

    answer: asyncio.Future[T]
    made_s: float = 0.0
    successor: asyncio.Future[T] | None = None
    """The answer that will take its place."""


class AnswerCache(Generic[T]):
    """Keeps answers for a short time; callers that come while one is being made wait for it.

    One that grows old is made anew while callers still get it, so that they wait only after a time without any. An
    answer made before `forget` is never given to a caller that came after it. Errors are not kept.
    """

    def __init__(self, keep_s: float, *, renew_s: float = math.inf, size: int = 1024) -> None:
        """Answers are given until they are `keep_s` old, and made anew when one is given that is `renew_s` old."""
        self._keep_s = keep_s
        self._renew_s = renew_s
        self._size = size
        self._kept: collections.OrderedDict[Hashable, _Kept[T]] = collections.OrderedDict()

    async def get(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> T:
        """The answer for a key; `make` is called when there is none that is fresh."""
        kept = self._kept.get(key)
        if kept is not None:
            if not kept.answer.done():
                return await asyncio.shield(kept.answer)
            age_s = time.monotonic() - kept.made_s
            if age_s < self._keep_s:
                if age_s >= self._renew_s and kept.successor is None:
                    self._succeed(key, kept, make)
                return kept.answer.result()
            if kept.successor is not None:
                return await asyncio.shield(kept.successor)
        made = self._kept[key] = _Kept(asyncio.ensure_future(make()))
        self._kept.move_to_end(key)
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)
        made.answer.add_done_callback(lambda done: self._settle(key, made, done))
        return await asyncio.shield(made.answer)

    def forget(self, key: Hashable) -> None:
        """Make the next call ask again."""
        self._kept.pop(key, None)

    def _succeed(self, key: Hashable, kept: _Kept[T], make: Callable[[], Awaitable[T]]) -> None:
        kept.successor = asyncio.ensure_future(make())
        kept.successor.add_done_callback(lambda done: self._settle(key, kept, done))

    def _settle(self, key: Hashable, kept: _Kept[T], done: asyncio.Future[T]) -> None:
        """An answer or a successor is made, or is not: whoever waits for it has it or its error."""
        failed = done.cancelled() or done.exception() is not None
        kept.successor = None
        if self._kept.get(key) is not kept:
            return
        if not failed:
            self._kept[key] = _Kept(done, time.monotonic())
        elif done is kept.answer:
            del self._kept[key]
