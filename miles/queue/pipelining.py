"""Sends Redis commands of concurrent callers in one round trip."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from redis.exceptions import ResponseError

if TYPE_CHECKING:
    import redis.asyncio


class Call(NamedTuple):
    """One call of a script that takes the arguments of several, one after the other, and returns a list of answers."""

    script: tuple[Any, ...]
    """Command, hash and keys: calls that share them are sent as one."""
    arguments: tuple[Any, ...]


Command = tuple[Any, ...] | Call
"""Name and arguments; or a call, whose answer is the only one in the list that the script returns."""

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
        joined = list(_joined(commands))
        answers: list[Any] = []
        for group, answer in zip(joined, await self._execute([_as_one(group) for group in joined]), strict=True):
            if not isinstance(group[0], Call):
                answers.append(answer)
            elif isinstance(answer, ResponseError) and len(group) > 1:
                # Perhaps of one of them, and the others have an answer.
                alone = await self._execute([_as_one([command]) for command in group])
                answers += [each if isinstance(each, ResponseError) else each[0] for each in alone]
            else:
                answers += [answer] if isinstance(answer, ResponseError) else answer
        return answers

    async def _execute(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
            return answers


def _joined(commands: Sequence[Command]) -> Iterator[list[Command]]:
    """Group calls of the same script that follow each other; every other command stays alone."""
    group: list[Command] = []
    for command in commands:
        if group and not (isinstance(command, Call) and isinstance(group[0], Call) and command[0] == group[0][0]):
            yield group
            group = []
        group.append(command)
    if group:
        yield group


def _as_one(group: Sequence[Command]) -> Sequence[Any]:
    """Return what is sent for calls of one script, or for a command."""
    first = group[0]
    if not isinstance(first, Call):
        return first
    return [*first.script, *(argument for call in group for argument in call[1])]
