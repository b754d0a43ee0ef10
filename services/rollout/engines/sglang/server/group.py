"""All servers of an engine, called together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from miles.change_signal import ChangeSignal
from miles.services.rollout.engines.base import EngineFailed
from miles.services.rollout.engines.sglang.errors import ServerRefused
from miles.services.rollout.engines.sglang.server.replica import Replica

log = logging.getLogger(__name__)


class ServerGroup:
    """Calls the servers that are up; one that fails is marked lost, and a call fails when no server is left."""

    def __init__(self, replicas: Sequence[Replica], changed: ChangeSignal, up_timeout_s: float) -> None:
        """`changed` fires when a server comes up or is lost; `up_timeout_s`: how long to wait for the first one."""
        self.replicas = replicas
        self._changed = changed
        self._up_timeout_s = up_timeout_s

    async def up(self) -> list[Replica]:
        """The servers that are up; waits for the first one. Raises EngineFailed when none comes up in time."""
        try:
            async with asyncio.timeout(self._up_timeout_s):
                while not (up := [replica for replica in self.replicas if replica.up]):
                    await self._changed.wait()
        except TimeoutError:
            raise EngineFailed(f"waited {self._up_timeout_s:g} s for an SGLang server to be up") from None
        return up

    async def pause(self, mode: str, *, always: bool = False, updates: bool = False) -> None:
        """Pause every server as `Replica.pause` does; no server may get a request meanwhile."""
        up = await self.up()
        await self.call_each(up, lambda replica: replica.pause(mode, always=always, updates=updates), "pause")

    async def resume(self) -> None:
        """Resume every server."""
        await self.call_each(await self.up(), lambda replica: replica.resume(), "resume")

    async def call_each(
        self,
        replicas: Sequence[Replica],
        call: Callable[[Replica], Awaitable[None]],
        what: str,
        blamed: tuple[type[Exception], ...] = (EngineFailed, ServerRefused),
    ) -> None:
        """Call every server; one whose call raises a `blamed` error is marked lost.

        Raises EngineFailed when all of them do, and any other error as it is.
        """
        outcomes = await asyncio.gather(*(call(replica) for replica in replicas), return_exceptions=True)
        failed = [(r, e) for r, e in zip(replicas, outcomes, strict=True) if isinstance(e, BaseException)]
        for replica, error in failed:
            if isinstance(error, blamed):
                log.warning("%s could not %s: %s", replica.name, what, error)
                replica.mark_lost(f"it could not {what}: {error}")
        for _, error in failed:
            if not isinstance(error, blamed):
                raise error
        if failed and len(failed) == len(replicas):
            raise EngineFailed(f"no SGLang server could {what}: {failed[0][1]}") from failed[0][1]
