"""Answers that many ask for at once, asked for once."""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class AnswerCache(Generic[T]):
    """Keeps answers for a short time; callers that come while one is being made wait for it.

    An answer made before `forget` is never given to a caller that came after it. Errors are not kept.
    """

    def __init__(self, keep_s: float, size: int = 1024) -> None:
        self._keep_s = keep_s
        self._size = size
        self._answers: collections.OrderedDict[Hashable, tuple[float, asyncio.Future[T]]] = collections.OrderedDict()

    async def get(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> T:
        """The answer for a key; `make` is called when there is none that is fresh."""
        known = self._answers.get(key)
        if known is not None:
            made_s, answer = known
            if not answer.done() or time.monotonic() - made_s < self._keep_s:
                return await asyncio.shield(answer)
        task = asyncio.ensure_future(make())
        self._answers[key] = (time.monotonic(), task)
        self._answers.move_to_end(key)
        while len(self._answers) > self._size:
            self._answers.popitem(last=False)
        task.add_done_callback(lambda done: self._settle(key, done))
        return await asyncio.shield(task)

    def forget(self, key: Hashable) -> None:
        """Make the next call ask again."""
        self._answers.pop(key, None)

    def _settle(self, key: Hashable, done: asyncio.Future[T]) -> None:
        known = self._answers.get(key)
        if known is None or known[1] is not done:
            done.cancelled() or done.exception()  # whoever waits has it
        elif done.cancelled() or done.exception() is not None:
            del self._answers[key]
        else:
            self._answers[key] = (time.monotonic(), done)
