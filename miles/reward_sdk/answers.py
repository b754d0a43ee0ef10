"""Answers that callers wait for, by the id of their request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


class Answers(Generic[Answer]):
    """Matches answers, which may come in any order, to the requests that wait for them."""

    def __init__(self) -> None:
        self._futures: dict[int, asyncio.Future[Answer]] = {}

    def __contains__(self, request_id: int) -> bool:
        """Whether a caller still waits for this answer."""
        return request_id in self._futures

    async def ask(self, request_id: int, send: Callable[[], None]) -> Answer:
        """Send a request and wait for its answer. Raises the error of `fail`."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._futures[request_id] = future
        try:
            send()
            return await future
        finally:
            del self._futures[request_id]

    def put(self, request_id: int, answer: Answer) -> None:
        """Hand an answer to its caller, if it still waits."""
        future = self._futures.get(request_id)
        if future is not None and not future.done():
            future.set_result(answer)

    def fail(self, error: Callable[[], Exception]) -> None:
        """Raise an error in every caller that waits."""
        for future in self._futures.values():
            if not future.done():
                future.set_exception(error())
