"""A run's draft trainer, beside the run loop: started, followed, its versions activated, held in the trainer's turn.

A run never waits for it, except for the end of an optimizer step before the trainer's turn on shared GPUs, and never
fails with it: without it, or with one that is lost, drafts only grow worse.

On GPUs that trainer and engines take turns on, drafts are trained and brought to engines in the engines' turn. There
the recordings of the step before are complete; decoding leaves a GPU's arithmetic idle, which the trainer does not; and
engines have taken a fixed share of the memory, while the trainer's peak must find all of it. In the trainer's turn
engines have no memory to load a draft into either.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping

from miles.change_signal import ChangeSignal
from miles.rpc.gen import draft_trainer_pb2, policy_pb2, weightsync_pb2
from miles.services.controller.clients import deadlines
from miles.services.controller.clients.calls import WeightsRefusedError, WorkerFailedError, WorkerLostError
from miles.services.controller.clients.draft_trainer import DraftTrainerClient
from miles.services.controller.clients.protocols import Rollouts
from miles.services.controller.clients.weightsync import WeightSyncClient
from miles.services.controller.jobs.context import JobContext
from miles.services.controller.run.alerts import RunAlerts
from miles.services.controller.run.draft_trainers import DraftTrainers
from miles.services.controller.run.draft_turn import DraftTurn
from miles.services.controller.run.load_faults import LoadFaults
from miles.services.controller.status.worker_activity import WorkerActivities
from miles.services.controller.workers.registry import AttachedWorker, WorkerRegistry
from miles.tasks import cancel

logger = logging.getLogger(__name__)

_CHECK_S = 0.5
"""How often a wait looks for what ends it."""
_RETRY_S, _LONGEST_RETRY_S = 5.0, 60.0
"""Time between two attempts at what has failed."""
_BUSY = {"training": "train draft", "publishing": "publish draft", "saving": "save draft"}
"""Activities in a run's timeline, by the first word of what the draft trainer says."""


class RunDrafts:
    """Follows one run's draft trainer, if drafts are trained at all, from `begin` to `close`."""

    def __init__(
        self,
        context: JobContext,
        registry: WorkerRegistry,
        weightsync: WeightSyncClient,
        rollouts: Rollouts,
        alerts: RunAlerts,
        activities: WorkerActivities,
    ) -> None:
        self.wanted = context.config.drafts.enable_draft_training
        self.active: int | None = None
        """Version of the draft that engines serve; None for the one that they began with."""
        self._context = context
        self._trainers = DraftTrainers(registry, alerts)
        self._weightsync = weightsync
        self._rollouts = rollouts
        self._alerts = alerts
        self._activities = activities
        self._policy_step: int | None = None
        """Training steps that the policy has taken; None before the run is loaded."""
        self._loads = 0
        """How often the run was loaded, a count."""
        self._tasks: list[asyncio.Task[None]] = []
        self._client: DraftTrainerClient | None = None
        """Set while the draft trainer has loaded the job."""
        self._said = draft_trainer_pb2.WatchDraftsResponse()
        self._prepared: int | None = None
        """Newest version that the draft trainer has published since it has loaded the job."""
        self._due: int | None = None
        """Version that engines are to be brought to."""
        self._newest = 0
        """Newest version that was ever published; 0 before the first."""
        self._activating = self._loading = False
        self._turn = DraftTurn(alerts)
        self._lost = ""
        """Name of the draft trainer that was lost, until there is a newer version."""
        self._pause_s = _RETRY_S
        self._news: Mapping[str, float] = {}
        """Metrics that were in no step's metrics yet."""
        self._changed = ChangeSignal()
        self._faults = LoadFaults()

    def begin(self) -> None:
        """Have the draft trainer load its model, while the run is loaded."""
        if not self.wanted:
            return
        self._tasks = [
            asyncio.create_task(self._follow(), name="draft trainer"),
            asyncio.create_task(self._activate(), name="activation of drafts"),
        ]
        for task in self._tasks:
            self._alerts.watch(task)

    def loaded(self, policy_step: int) -> None:
        """The run was loaded, for the first time or again, with so many steps taken by the policy."""
        self._policy_step = policy_step
        self._loads += 1

    async def close(self) -> None:
        """Follow it no more; it goes on by itself."""
        tasks, self._tasks = self._tasks, []
        await cancel(*tasks)

    async def leave_gpus(self, check: Callable[[], None]) -> None:
        """Return once the draft trainer neither loads nor computes and no engine loads a draft, until `return_to_gpus`.

        `check` raises what ends the wait, which has an end of its own.
        """
        if not self.wanted:
            return
        self._turn.held = True
        end = time.monotonic() + deadlines.HOLD_DRAFTS_S
        while (self._activating or self._loading) and time.monotonic() < end:
            check()
            await self._changed.wait(_CHECK_S)
        if (client := self._client) is not None:
            await self._turn.tell(client)

    async def return_to_gpus(self) -> None:
        """End that."""
        if not self._turn.held:
            return
        self._turn.held = False
        self._changed.notify()
        if (client := self._client) is not None:
            await self._turn.tell(client)

    def take_metrics(self) -> dict[str, float]:
        """Metrics for a step's; those of a version once."""
        if not self.wanted:
            return {}
        news, self._news = self._news, {}
        missed = float(self._said.missed_recordings)
        return {**news, "draft/version": float(self.active or 0), "draft/missed_recordings": missed}

    def describe(self) -> str:
        """What the draft trainer does, in words; empty while there is none."""
        return self._said.activity if self._client is not None else ""

    # -- the draft trainer --------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Have a draft trainer work on the job, again and again."""
        while True:
            worker = await self._trainers.next(quiet=bool(self._lost))
            what = "is lost"
            try:
                await self._follow_worker(worker)
                why = "it has left the job"
            except WorkerLostError as error:
                why = str(error)
            except WorkerFailedError as error:
                what, why = "trains no drafts", str(error)
            if not self._trainers.end_round(worker.worker_id):
                continue  # another may be idle
            if self._lost != worker.worker_id:
                self._lost = worker.worker_id
                self._alerts.report(f"{worker.worker_id} {what}, and the run goes on with the draft that it has: {why}")
            if worker.lost.is_set():
                self._pause_s = _RETRY_S
            else:  # the same process is asked again, ever more seldom
                await asyncio.sleep(self._pause_s)
                self._pause_s = min(2 * self._pause_s, _LONGEST_RETRY_S)

    async def _follow_worker(self, worker: AttachedWorker) -> None:
        client = DraftTrainerClient(worker, self._context, self._weightsync.address)
        self._prepared = None  # it publishes again what it goes on from: the bytes may have been lost with it
        try:
            loads = await self._start(client)
            self._client = client
            await self._turn.tell(client)  # the same process may have been followed before, and held
            while await self._watch(client, loads):
                loads, self._prepared = self._loads, None
                await client.start_job(self._policy_step)
        finally:
            self._client = None
            self._activities.end(worker.worker_id)
            await client.aclose()

    async def _start(self, client: DraftTrainerClient) -> int:
        """Have it load the job, but not in the trainer's turn; return how often the run was loaded by then."""
        if client.has_gpu and self._turn.held:
            with contextlib.suppress(WorkerLostError, WorkerFailedError):  # most likely it has no job to be held
                await client.hold(release_memory=True)
        while client.has_gpu and self._turn.held:
            if client.worker.lost.is_set():
                raise WorkerLostError("its worker lease ended in the trainer's turn on the GPUs")
            await self._changed.wait(_CHECK_S)
        loads, self._loading = self._loads, client.has_gpu
        try:
            with self._activities.during(client.worker_id, "load"):
                await client.start_job(self._policy_step)
        except WorkerFailedError:
            self._trainers.refused(client.worker_id)
            raise
        finally:
            self._loading = False
            self._changed.notify()
        self._trainers.loaded(client.worker_id)
        return loads

    async def _watch(self, client: DraftTrainerClient, loads: int) -> bool:
        """Follow the training; returns whether it is to be told that the run was loaded again, else at its end.

        What is still on its way then is of the policy of before, and is not read.
        """
        async with contextlib.aclosing(client.watch()) as messages:
            async for message in messages:
                if self._loads != loads:
                    return True
                self._note(client.worker_id, message)
        return False

    def _note(self, worker_id: str, message: draft_trainer_pb2.WatchDraftsResponse) -> None:
        for warning in message.warnings:
            self._alerts.warn(f"{worker_id}: {warning}")
        word = message.activity.split(" ", 1)[0]
        if word != self._said.activity.split(" ", 1)[0]:
            self._activities.end(worker_id)
            if word in _BUSY:
                self._activities.begin(worker_id, _BUSY[word])
        self._said = message
        if message.HasField("recorded_step") and self._policy_step is not None:
            # What it goes on from after a loss, unless the policy is taken back.
            self._policy_step = max(self._policy_step, message.recorded_step + 1)
        if message.HasField("version") and message.version != self._prepared:
            self._prepared = self._due = message.version
            self._news = dict(message.metrics)
            self._changed.notify()
            if message.version > self._newest:  # not before: one that fails again and again publishes the last again
                self._newest = message.version
                self._note_recovery(worker_id)

    def _note_recovery(self, worker_id: str) -> None:
        self._pause_s = _RETRY_S
        if self._lost:
            what = "is back, and goes on" if self._lost == worker_id else f"goes on for {self._lost},"
            self._alerts.report(f"{worker_id} {what} training drafts")
            self._lost = ""

    # -- its versions -------------------------------------------------------------------------------------------------

    async def _activate(self) -> None:
        """Bring engines to the newest version, again and again."""
        while True:
            version = self._due
            if version is None or self._turn.held:
                await self._changed.wait()
                continue
            self._activating, pause_s = True, 0.0
            try:
                async with asyncio.timeout(deadlines.ACTIVATE_S + 30):
                    await self._activate_version(version)
                logger.info("draft version %d is active", version)
                self.active = version
                self._faults.clear()
                self._done(version)
            except WeightsRefusedError as error:
                self._alerts.warn(f"engines cannot take version {version} of the draft: {error}")
                self._done(version)
            except (WorkerLostError, WorkerFailedError, TimeoutError) as error:
                self._alerts.warn(f"version {version} of the draft is not active yet, which is tried again: {error}")
                pause_s = _RETRY_S
            finally:
                self._activating = False
                self._changed.notify()
            await asyncio.sleep(pause_s)

    def _done(self, version: int) -> None:
        """Nothing is left to do about a version, unless a newer one is due by now."""
        if self._due == version:
            self._due = None

    async def _activate_version(self, version: int) -> None:
        async def note(engine: weightsync_pb2.EngineStatus) -> None:
            if news := self._faults.note(version, engine):
                self._alerts.warn(f"draft: {news}")

        await self._weightsync.activate(
            self._context.job_id,
            version,
            min_engines=0,  # an engine without it drafts as before
            wait_for=sorted(client.worker_id for client in self._rollouts.connected()),
            check_equal=self._context.config.weights.check_weight_update_equal,
            on_engine=note,
            stream_kind=policy_pb2.WEIGHT_STREAM_DRAFT,
        )
