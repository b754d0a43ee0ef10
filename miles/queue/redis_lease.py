"""Which controller a Redis belongs to: one at a time, by a lease that it renews for as long as it lives.

Two controllers of one Redis would run the same jobs. A second one is refused; one that starts after another was killed
takes over at once where it can see that the other is gone, and elsewhere when its lease has run out.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import json
import logging
import os
import pathlib
import socket
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import redis.asyncio

from miles.queue.backpressure import TRANSIENT
from miles.queue.errors import RedisInUse
from miles.tasks import cancelled_at_end

logger = logging.getLogger(__name__)

KEY = "miles:controller"
TTL_S = 10.0
_RENEW_S = 2.0
WAIT_S = TTL_S + _RENEW_S
"""Longer than a lease that is not renewed lasts."""
_POLL_S = 0.25
_HOLD = """
-- KEYS controller ; ARGV mine, dead or '', ttl_ms
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] and held ~= ARGV[2] then return held end
-- A full Redis refuses a script's first write, but never PERSIST.
redis.call('PERSIST', KEYS[1])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
return ''
"""
_RELEASE = """
-- KEYS controller ; ARGV mine
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 1
"""


@dataclasses.dataclass(frozen=True, slots=True)
class RedisOwner:
    """The controller process that a Redis belongs to."""

    host: str
    pid: int
    since: str
    """ISO 8601, UTC."""
    machine: str
    """Boot and process namespace: where `pid` has a meaning."""
    started: int
    """Start of the process in clock ticks since boot: another one may get its id."""
    unique: str

    @classmethod
    def this_process(cls) -> RedisOwner:
        """Return this process as the owner from now on."""
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        pid = os.getpid()
        return cls(socket.gethostname(), pid, since, _machine(), _started(pid) or 0, uuid.uuid4().hex)

    @property
    def is_dead(self) -> bool:
        """Whether it is known to have ended; False also for a process elsewhere, of which nothing is known."""
        return bool(self.machine) and self.machine == _machine() and _started(self.pid) != self.started

    def __str__(self) -> str:
        return f"the controller with process id {self.pid} on {self.host}, since {self.since}"


class RedisLease:
    """This process's lease of a Redis."""

    def __init__(self, client: redis.asyncio.Redis, mine: str) -> None:
        self._hold = client.register_script(_HOLD)
        self._release = client.register_script(_RELEASE)
        self._mine = mine

    @classmethod
    async def acquire(cls, client: redis.asyncio.Redis, wait_s: float = WAIT_S) -> RedisLease:
        """Take the lease, waiting for an owner that ends just now, or whose lease runs out.

        Raises RedisInUse when it is still held after `wait_s`.
        """
        lease = cls(client, json.dumps(dataclasses.asdict(RedisOwner.this_process())))
        end = time.monotonic() + wait_s
        dead, waiting = "", False
        while held := await lease._try(dead):
            owner = _parsed(held)
            if owner is not None and owner.is_dead:
                dead = held
                continue
            if time.monotonic() > end:
                raise RedisInUse(_in_use(owner, held))
            if not waiting:
                logger.warning("waiting up to %g s for %s to end or to lose its lease", wait_s, owner or "its owner")
                waiting = True
            await asyncio.sleep(_POLL_S)
        return lease

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[asyncio.Task[NoReturn]]:
        """Renew the lease until the end of the block, however that ends, and give it back then.

        Yields the task that renews it, which fails with RedisInUse when another process has taken it.
        """
        keeping = asyncio.create_task(self.keep())
        try:
            async with cancelled_at_end(keeping):
                yield keeping
        finally:
            with contextlib.suppress(*TRANSIENT):
                await self.release()

    async def keep(self) -> NoReturn:
        """Renew the lease until cancelled. Raises RedisInUse when another process has taken it meanwhile."""
        while True:
            await asyncio.sleep(_RENEW_S)
            try:
                held = await self._try("")
            except TRANSIENT:
                continue  # the client has waited; whether Redis is lost is for others to say
            if held:
                raise RedisInUse(f"{_in_use(_parsed(held), held)}, and took it from this one, which had not renewed it")

    async def release(self) -> None:
        """Give the lease back, so that the next controller need not wait."""
        await self._release(keys=[KEY], args=[self._mine])

    async def _try(self, dead: str) -> str:
        """Take or renew the lease; return the one that is in the way, or nothing."""
        answer: Any = await self._hold(keys=[KEY], args=[self._mine, dead, int(TTL_S * 1000)])
        return bytes(answer).decode(errors="replace")


def _in_use(owner: RedisOwner | None, held: str) -> str:
    who = str(owner) if owner is not None else f"a owner that is not known ({held[:200]!r})"
    return f"{who}, uses this Redis; stop that one, or give each its own Redis or database number (redis://HOST/1)"


def _parsed(held: str) -> RedisOwner | None:
    try:
        return RedisOwner(**json.loads(held))
    except (ValueError, TypeError):
        return None


def _machine() -> str:
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not known on this system: an owner is dead when its lease has run out
        return ""


def _started(pid: int) -> int | None:
    """Return when a process began, in clock ticks since boot; None when it has ended."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
