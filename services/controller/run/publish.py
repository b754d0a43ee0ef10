"""Brings the trainer's weights to the engines: export, then activation, which may go on while the trainer goes on."""

from __future__ import annotations

import asyncio
import logging
import time
from asyncio import FIRST_COMPLETED
from collections.abc import Callable

from miles.services.controller.clients.trainer import TrainerLink, activate
from miles.services.controller.jobs.context import JobContext
from miles.services.controller.run.dispatcher import Dispatcher
from miles.services.controller.status.activity import ActivityClock
from miles.services.controller.status.worker_activity import WorkerActivity
from miles.services.controller.workers.registry import AttachedWorker

logger = logging.getLogger(__name__)

_LOOK_FOR_LOST_S = 1.0


class Publishing:
    """One job's publications. `on_active` is called on the event loop with each version that engines serve."""

    def __init__(
        self,
        context: JobContext,
        weightsync: AttachedWorker,
        dispatcher: Dispatcher,
        clock: ActivityClock,
        activity: WorkerActivity,
        on_active: Callable[[int], None],
    ) -> None:
        self._context = context
        self._weightsync = weightsync
        self._activity = activity
        self._dispatcher = dispatcher
        self._clock = clock
        self._on_active = on_active
        self._activation: asyncio.Task[None] | None = None
        self.active: int | None = None
        """Version that engines serve; None before the first."""
        self.newest = 0
        """Version that was exported last, active or about to be."""

    async def export(self, trainer: TrainerLink, version: int) -> None:
        """Have the trainer hand over a version, once the one before is active, and begin its activation."""
        await self.settle()
        with self._clock.during("sync"), self._activity.during(trainer.worker_id, "export"):
            exported = await trainer.export(version)
        logger.info("version %d is prepared (%d bytes)", version, exported.total_bytes)
        self.newest = version
        self._activation = asyncio.create_task(self._activate(version))

    async def settle(self) -> None:
        """Wait until the version that was exported last is active; raises why it is not."""
        if self._activation is not None:
            await self._activation
            self._activation = None

    async def collect(self) -> None:
        """Raise what an activation under way has failed for, if it has; waits for nothing."""
        if self._activation is not None and self._activation.done():
            await self.settle()

    async def cancel(self) -> None:
        """Forget an activation under way; the next export takes its place."""
        if self._activation is not None:
            self._activation.cancel()
            await asyncio.gather(self._activation, return_exceptions=True)
            self._activation = None

    async def _activate(self, version: int) -> None:
        """Waits for every worker that is alive; when one is lost meanwhile, has weight sync go on without it."""
        began = time.monotonic()
        alive = self._alive()
        calls = {asyncio.create_task(self._call(version, alive))}
        with self._clock.during("sync"), self._activity.during(self._weightsync.worker_id, "activate"):
            try:
                while not (
                    done := (await asyncio.wait(calls, timeout=_LOOK_FOR_LOST_S, return_when=FIRST_COMPLETED))[0]
                ):
                    left = alive & self._alive()
                    if left and left != alive:
                        alive = left
                        calls.add(asyncio.create_task(self._call(version, alive)))
                done.pop().result()
            finally:
                for call in calls:
                    call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)
        logger.info("version %d is active after %.2f s", version, time.monotonic() - began)
        self.active = version
        self._on_active(version)

    async def _call(self, version: int, alive: frozenset[str]) -> None:
        # A version that half of the engines cannot load is not fit to be served.
        min_engines = max(1, (len(alive) + 1) // 2)
        address = self._weightsync.registration.address
        await activate(self._context, address, version, min_engines, sorted(alive))

    def _alive(self) -> frozenset[str]:
        return frozenset(link.worker_id for link in self._dispatcher.connected())
