"""Publishes a version: the trainer exports its weights, then engines activate them, while the trainer may continue."""

from __future__ import annotations

import asyncio
import logging
import time
from asyncio import FIRST_COMPLETED
from collections.abc import Awaitable, Callable

from miles.rpc.gen import weightsync_pb2
from miles.services.controller.clients.protocols import Rollouts, Trainer
from miles.services.controller.clients.weightsync import WeightSyncClient
from miles.services.controller.jobs.context import JobContext
from miles.services.controller.run.load_faults import LoadFaults
from miles.services.controller.run.report import RunReport
from miles.services.controller.status.activity import ActivityClock
from miles.services.controller.status.worker_activity import WorkerActivities
from miles.tasks import cancel
from miles.telemetry.tracing import traced

logger = logging.getLogger(__name__)

_LOOK_FOR_LOST_S = 1.0
_CHECK_S = 0.5
"""How often a wait looks for what ends it."""


class Publisher:
    """Publishes one job's versions. `on_active` is called on the event loop with each version that engines serve."""

    def __init__(
        self,
        context: JobContext,
        weightsync: WeightSyncClient,
        rollouts: Rollouts,
        clock: ActivityClock,
        activities: WorkerActivities,
        report: RunReport,
        on_active: Callable[[int], None],
        leave_to_engines: Callable[[Trainer], Awaitable[None]],
    ) -> None:
        """Without engines, or without a trainer, versions are counted and not published.

        `leave_to_engines` has the trainer free GPUs that the engines are about to load a version on.
        """
        self.publishes = context.config.debug.has_engines and context.config.debug.has_trainer
        self._context = context
        self._weightsync = weightsync
        self._rollouts = rollouts
        self._clock = clock
        self._activities = activities
        self._report = report
        self._on_active = on_active
        self._leave_to_engines = leave_to_engines
        self._activation: asyncio.Task[None] | None = None
        self.active: int | None = None
        """Version that engines serve; None before the first."""
        self.newest = 0
        """Version that was exported last, active or about to be."""
        self.newest_bytes = 0
        """Size of that version as engines get it whole."""
        self._loading: dict[str, weightsync_pb2.EngineStatus] = {}
        """What engines said last of the version that is being activated, by name."""
        self.faults = LoadFaults()
        """Of the version that is being activated."""

    @traced("export call")
    async def export(self, trainer: Trainer, version: int, check: Callable[[], None]) -> None:
        """Export a version, once the one before is active, and begin its activation.

        `check` raises what ends the wait.
        """
        if not self.publishes:
            self.newest = self.active = version
            self._on_active(version)
            return
        await self.wait_until_active(check)
        with self._clock.during("sync"), self._activities.during(trainer.worker_id, "export"):
            exported = await trainer.export(version)
        logger.info("version %d is prepared (%d bytes)", version, exported.total_bytes)
        self.newest, self.newest_bytes = version, exported.total_bytes
        await self._leave_to_engines(trainer)
        self._activation = asyncio.create_task(self._activate(version))

    async def wait_until_active(self, check: Callable[[], None]) -> None:
        """Wait until the version that was exported last is active; raise the error of a failed activation.

        `check` raises what ends the wait; engines then go on loading.
        """
        if self._activation is None:
            return
        while not self._activation.done():
            check()
            await asyncio.wait({self._activation}, timeout=_CHECK_S)
        await self._activation
        self._activation = None

    async def check(self) -> None:
        """Raise the error of an activation that has failed; does not wait for one that runs."""
        if self._activation is not None and self._activation.done():
            await self._activation
            self._activation = None

    async def cancel(self) -> None:
        """Forget an activation that runs; the next export replaces it."""
        if self._activation is not None:
            await cancel(self._activation)
            self._activation = None

    @traced("activate call")
    async def _activate(self, version: int) -> None:
        began = time.monotonic()
        with self._clock.during("sync"), self._activities.during(self._weightsync.worker_id, "activate"):
            await self._activate_on_live_workers(version)
        logger.info("version %d is active after %.2f s", version, time.monotonic() - began)
        self.active = version
        self.faults.clear()
        self._loading.clear()
        self._on_active(version)

    async def _activate_on_live_workers(self, version: int) -> None:
        """Wait for every live worker; when one is lost meanwhile, weight sync continues without it."""
        alive = self._alive()
        calls = {asyncio.create_task(self._call(version, alive))}
        try:
            while not (done := (await asyncio.wait(calls, timeout=_LOOK_FOR_LOST_S, return_when=FIRST_COMPLETED))[0]):
                left = alive & self._alive()
                if left and left != alive:
                    alive = left
                    calls.add(asyncio.create_task(self._call(version, alive)))
            done.pop().result()
        finally:
            await cancel(*calls)

    async def _call(self, version: int, alive: frozenset[str]) -> None:
        await self._weightsync.activate(
            self._context.job_id,
            version,
            min_engines=max(1, (len(alive) + 1) // 2),  # a version that half of the engines cannot load is not fit
            wait_for=sorted(alive),
            check_equal=self._context.config.weights.check_weight_update_equal,
            on_engine=lambda engine: self._note(version, engine),
        )

    def engines_behind(self) -> str:
        """Name the engines that do not serve the newest version yet, with their states; empty when all do."""
        if self.active == self.newest:
            return ""
        known = {client.worker_id: "no word yet" for client in self._rollouts.connected()}
        for name, engine in self._loading.items():
            known[name] = weightsync_pb2.EngineState.Name(engine.state).removeprefix("ENGINE_STATE_").lower()
            if engine.HasField("version"):
                known[name] += f" version {engine.version}"
            if engine.state == weightsync_pb2.ENGINE_STATE_SERVING and engine.version == self.newest:
                del known[name]
        return ", ".join(f"{name} ({state})" for name, state in sorted(known.items()))

    async def _note(self, version: int, engine: weightsync_pb2.EngineStatus) -> None:
        self._loading[engine.engine_id] = engine
        if news := self.faults.note(version, engine):
            await self._report.warn(news)

    def _alive(self) -> frozenset[str]:
        return frozenset(client.worker_id for client in self._rollouts.connected())
