"""Rank 0's worker thread: it runs commands on all ranks, one after the other, so that the event loop never waits."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import Any, TypeVar

from miles.services.trainer.ranks.collective_calls import EXIT, HEARTBEAT, Command, Ranks, RanksLostError
from miles.services.trainer.ranks.worker import RankWorker
from miles.threads import Threads, only_exceptions

T = TypeVar("T")
_HEARTBEAT_EVERY_S = 60.0


class Leader:
    """Runs commands on every rank from a thread of its own."""

    def __init__(self, ranks: Ranks, worker: RankWorker, on_lost: Callable[[str], None] = lambda reason: None) -> None:
        """`on_lost` is called when ranks are lost in the middle of a command, before the caller hears of it."""
        self._on_lost = on_lost
        self._ranks = ranks
        self._worker = worker
        self._thread = Threads(1, thread_name_prefix="trainer")
        self._exit: concurrent.futures.Future[None] | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks that train together."""
        return self._ranks.count

    @property
    def worker(self) -> RankWorker:
        """Rank 0's own worker."""
        return self._worker

    async def run(self, command: Command, **local: Any) -> Any:
        """Run a command on all ranks and return rank 0's result; `local` goes to rank 0's `RankWorker.run` only.

        Runs to its end even when the caller is cancelled.
        """
        result, _ = await self._in_thread(lambda: self._run(command, local))
        return result

    async def gather(self, command: Command, **local: Any) -> list[bytes]:
        """Run a command whose result is bytes on all ranks, as `run` does, and return every rank's result."""
        _, reports = await self._in_thread(lambda: self._run(command, local))
        return reports

    async def alone(self, call: Callable[[RankWorker], T]) -> T:
        """Call something on this rank only, in turn with the commands."""
        return await self._in_thread(lambda: call(self._worker))

    async def send_heartbeats(self) -> None:
        """Tell the other ranks regularly that rank 0 is alive, until cancelled."""
        while True:
            await asyncio.sleep(_HEARTBEAT_EVERY_S)
            await self._in_thread(self._send_heartbeat)

    def close(self, deadline_s: float) -> bool:
        """Have the other ranks exit; False when the running command has not ended after `deadline_s`."""
        if self._exit is None:
            self._exit = self._thread.submit(lambda: self._ranks.send(Command(EXIT)))
        return not concurrent.futures.wait([self._exit], timeout=deadline_s).not_done

    def _send_heartbeat(self) -> None:
        try:
            self._ranks.send(Command(HEARTBEAT))
        except RanksLostError as lost:
            self._on_lost(str(lost))
            raise

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, call))

    def _run(self, command: Command, local: dict[str, Any]) -> tuple[Any, list[bytes]]:
        try:
            return self._run_on_all(command, local)
        except RanksLostError as lost:
            self._on_lost(str(lost))
            raise

    def _run_on_all(self, command: Command, local: dict[str, Any]) -> tuple[Any, list[bytes]]:
        self._ranks.send(command)
        result: Any = None
        error: Exception | None = None
        try:
            with only_exceptions():
                result = self._worker.run(command, **local)
        except Exception as caught:
            error = caught
        reports = self._ranks.agree(error, result if isinstance(result, bytes) else b"")
        return result, reports
