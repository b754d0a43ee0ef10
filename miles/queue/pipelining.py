"""Sends Redis commands of concurrent callers in one round trip."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from redis.exceptions import ResponseError

if TYPE_CHECKING:
    import redis.asyncio

Command = tuple[Any, ...]
"""Name and arguments."""

_TOGETHER_BYTES = 64 << 10
"""Commands up to this size share a round trip; bigger ones are sent concurrently."""
_MAX_TOGETHER = 64


class Pipeliner:
    """Sends commands at once when no round trip is in progress, else together in the next one, in the order given."""

    def __init__(self, redis: redis.asyncio.Redis) -> None:
        self._redis = redis
        self._waiting: collections.deque[tuple[Sequence[Command], asyncio.Future[list[Any]]]] = collections.deque()
        self._sender: asyncio.Task[None] | None = None

    async def run(self, commands: Sequence[Command], nbytes: int) -> list[Any]:
        """Send commands of about `nbytes` bytes and return the answers. Raises the first answer that is an error.

        They are executed in order, also after one fails, possibly with commands of other callers between them. They
        must be idempotent: all of them are repeated when the connection is lost.
        """
        if nbytes > _TOGETHER_BYTES:
            answers = await self._send(commands)
        else:
            future = asyncio.get_running_loop().create_future()
            self._waiting.append((commands, future))
            if self._sender is None:
                self._sender = asyncio.create_task(self._send_waiting())
            answers = await future
        for answer in answers:
            if isinstance(answer, ResponseError):
                raise answer
        return answers

    async def hget(self, key: str, field: str) -> bytes | None:
        """Return a field of a hash, None when it has none; many lookups at once cost hardly more than one."""
        [value] = await self.run([("HGET", key, field)], 0)
        return None if value is None else bytes(value)

    async def _send_waiting(self) -> None:
        batch: list[tuple[Sequence[Command], asyncio.Future[list[Any]]]] = []
        try:
            while self._waiting:
                batch = [self._waiting.popleft() for _ in range(min(_MAX_TOGETHER, len(self._waiting)))]
                try:
                    answers = iter(await self._send([command for commands, _ in batch for command in commands]))
                except Exception as error:  # any error belongs to the callers of these commands
                    for _, future in batch:
                        if not future.done():
                            future.set_exception(error)
                    continue
                for commands, future in batch:
                    own = [next(answers) for _ in commands]
                    if not future.done():
                        future.set_result(own)
        finally:
            # Also when the task is cancelled: no caller may wait for ever.
            self._sender = None
            for _, future in (*batch, *self._waiting):
                future.cancel()
            self._waiting.clear()

    async def _send(self, commands: Sequence[Command]) -> list[Any]:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
            return answers
