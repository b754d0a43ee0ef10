"""Decides which job runs: one at a time, in order of submission, as soon as the workers that it needs are attached.

A job that a restart interrupted goes before all others: workers may still have it loaded.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from miles.queue.backpressure import TRANSIENT
from miles.rpc.gen import controller_pb2, job_pb2
from miles.services.controller.clients import deadlines
from miles.services.controller.errors import ConflictError, NotPossibleNowError
from miles.services.controller.jobs.controls import JobControls
from miles.services.controller.jobs.queue_waits import QueueWaits, waits_in_queue
from miles.services.controller.jobs.records import ENDED, is_unreadable
from miles.services.controller.jobs.resources import Supply, lacking
from miles.services.controller.jobs.resubmission import go_on_with, may_go_on
from miles.services.controller.jobs.runner import JobRunner
from miles.services.controller.jobs.saved_steps import saved_step
from miles.services.controller.jobs.store import JobStore
from miles.services.controller.workers.registry import WorkerRegistry
from miles.services.controller.workers.required_workers import nodes_of_trainer, served_rewards
from miles.tasks import cancelled_at_end

logger = logging.getLogger(__name__)

_START_UP_S = 60.0
"""For so long after the controller's start, until a trainer has attached, jobs do not wait for workers: these are
starting too, and the data can be read meanwhile."""
_LOOK_S = 1.0
"""How often the queue is looked at for what its jobs wait for."""


class OperationReusedError(ConflictError):
    """An idempotency key was used again with another action."""

    def __init__(self, job_id: str, before: int, action: int) -> None:
        first, second = (
            controller_pb2.JobAction.Name(kind).removeprefix("JOB_ACTION_").lower()  # type: ignore[arg-type]
            for kind in (before, action)
        )
        super().__init__(f"{first} of job {job_id} was sent with this key; send a new key with {second}")


class JobScheduler:
    """Takes jobs from the store and runs them."""

    def __init__(self, store: JobStore, runner: JobRunner, registry: WorkerRegistry) -> None:
        self._store = store
        self._runner = runner
        self._registry = registry
        self._submitted = asyncio.Event()
        self._controls: dict[str, JobControls] = {}
        self._queue_waits = QueueWaits()
        self._untold: list[tuple[str, str]] = []
        """Lines that are not in the histories of their jobs yet, each with the job's id."""
        self._waiting_ids: frozenset[str] = frozenset()
        """Jobs in the queue when it was looked at last."""
        self._deciding = asyncio.Lock()
        """Held from reading a job's record until what follows is done: a start, or what a user asked."""
        self._woken = False
        """Whether a job may have come into the queue since it was looked at."""
        self._started_up = False
        """Whether a trainer has attached since the controller's start."""
        self._began_s = time.monotonic()
        self.running: str | None = None
        """Id of the job that runs."""

    async def describe(self, job: job_pb2.Job) -> controller_pb2.DescribeRunResponse:
        """Describe what a job's run does and waits for now, or why it does not run."""
        if job.job_id == self.running:
            config = json.loads(job.config_json)
            if (status := self._runner.status) is not None:
                return status.describe(config["rollout_batch_size"], self._registry.everyone())
            return _outside_of_run(job, phase="starting", since_unix_ns=time.time_ns())
        if job.state in ENDED:
            return _outside_of_run(job, phase="ended", since_unix_ns=job.ended_unix_ns)
        waiting = await self._waiting()
        ahead = next((number for number, other in enumerate(waiting) if other.job_id == job.job_id), 0)
        ahead += self.running is not None
        waits = waits_in_queue(self._lacks(job), ahead, self.running or "")
        return _outside_of_run(
            job,
            phase="queued",
            waiting_for="; ".join(wait.what for wait in reversed(waits)),
            since_unix_ns=job.submitted_unix_ns,
            jobs_ahead=ahead,
            waits=self.waits(job),
        )

    def waits(self, job: job_pb2.Job) -> list[job_pb2.Wait]:
        """Return what a job waits for, as it was seen within the last second."""
        if job.job_id == self.running:
            return [wait.to_proto() for wait in (self._runner.status.waits if self._runner.status is not None else ())]
        return [wait.to_proto() for wait in self._queue_waits.of(job.job_id)]

    async def tell_waits(self) -> NoReturn:
        """Write to the histories of queued jobs what they wait for, also while another one runs, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            if not self._waiting_ids and not self._woken:
                continue
            try:
                await self._tell_waits()
            except TRANSIENT as error:  # whoever runs a job waits for Redis too, and knows when to give up
                logger.info("Redis is away: %s", error)
                self._woken = True

    async def _tell_waits(self) -> None:
        self._woken = False
        waiting = await self._waiting()
        self._waiting_ids = frozenset(job.job_id for job in waiting)
        running = self.running
        waits = {
            job.job_id: waits_in_queue(self._lacks(job), number + (running is not None), running or "")
            for number, job in enumerate(waiting)
        }
        for job_id, line in self._queue_waits.note(waits, time.time()):
            if running is None:  # else the line would be in the log of the job that runs
                logger.info("job %s waits: %s", job_id, line)
            self._untold.append((job_id, line))
        while self._untold:
            job_id, line = self._untold[0]
            log = job_pb2.LogLine(level=job_pb2.LOG_LEVEL_WARNING, source="controller", text=line)
            await self._store.add_event(job_pb2.JobEvent(job_id=job_id, log=log))
            del self._untold[0]  # only now: without Redis, it is told later

    def wake(self) -> None:
        """A job was submitted."""
        self._submitted.set()
        self._woken = True

    async def run(self) -> None:
        """Run jobs until cancelled."""
        while True:
            self._submitted.clear()
            async with self._deciding:
                job = await self._next()
                self.running = None if job is None else job.job_id
            if job is None:
                await self._wait_for_change()
                continue
            logger.info("running job %s", job.job_id)
            await self._runner.run(job, self._controls_of(job))
            async with self._deciding:  # what came too late for this run must not end the next one
                self.running = None
                del self._controls[job.job_id]

    def _controls_of(self, job: job_pb2.Job) -> JobControls:
        paused = job.state == job_pb2.JOB_STATE_PAUSED  # before a restart of the controller
        return self._controls.setdefault(job.job_id, JobControls(paused=paused))

    async def go_on(self, job_id: str, settings: Mapping[str, Any]) -> tuple[job_pb2.Job, bool]:
        """Let a job go on with the settings (flat) that its command was given again with, if it may.

        Returns its record and whether it does. Raises SharedFolderError when another job has one of its folders now.
        """
        async with self._deciding:
            job = await self._store.get(job_id)
            if not may_go_on(job, settings, self.running):
                return job, False
            event = go_on_with(job, settings)
            await self._store.refuse_shared(job)
            await self._store.put(job, event)
        self.wake()
        return job, True

    async def control(self, job_id: str, action: controller_pb2.JobAction.ValueType, operation_id: str) -> job_pb2.Job:
        """Apply an action to a job; an operation that was applied before does nothing.

        Raises UnknownJobError, OperationReusedError when the operation was another action, and NotPossibleNowError when
        the job's state rules the action out.
        """
        async with self._deciding:
            before = await self._store.operation(job_id, operation_id) if operation_id else None
            if before is not None and before != action:
                raise OperationReusedError(job_id, before, action)
            job = await self._store.get(job_id)
            if before is None:
                job = await self._apply(job, action)
                if operation_id:
                    await self._store.add_operation(job_id, operation_id, action)
            return job

    async def _apply(self, job: job_pb2.Job, action: controller_pb2.JobAction.ValueType) -> job_pb2.Job:
        if job.state in ENDED:
            return await self._control_ended(job, action)
        if job.state == job_pb2.JOB_STATE_QUEUED and job.job_id != self.running:
            return await self._control_queued(job, action)
        self._controls_of(job).apply(action)
        return job

    async def _control_ended(self, job: job_pb2.Job, action: controller_pb2.JobAction.ValueType) -> job_pb2.Job:
        if (action, job.state) in _ALREADY_DONE:
            return job
        if is_unreadable(job):
            raise NotPossibleNowError(job.error)
        if action == controller_pb2.JOB_ACTION_RESUME and job.state in RESUMABLE:
            await self._store.refuse_shared(job)
            job.error, job.ended_unix_ns = "", 0
            await self._move(
                job, job_pb2.JOB_STATE_QUEUED, "resumed by the user; it goes on from its newest checkpoint"
            )
            self.wake()
            return job
        advice = "resume it, or submit it as a new job" if job.state in RESUMABLE else "submit it as a new job"
        raise NotPossibleNowError(f"job {job.job_id} has ended ({_name(job.state)}); {advice}")

    async def _control_queued(self, job: job_pb2.Job, action: controller_pb2.JobAction.ValueType) -> job_pb2.Job:
        if action == controller_pb2.JOB_ACTION_RESUME:
            return job
        end = _END_OF_QUEUED.get(action)
        if end is None:
            raise NotPossibleNowError(
                f"job {job.job_id} has not begun to run; cancel it, or stop it to take it out of the queue until it is "
                "resumed"
            )
        job.ended_unix_ns = time.time_ns()
        await self._move(job, end, "taken out of the queue by the user")
        return job

    async def _move(self, job: job_pb2.Job, state: job_pb2.JobState.ValueType, reason: str) -> None:
        job.state = state
        changed = job_pb2.JobStateChanged(state=state, reason=reason)
        await self._store.put(job, job_pb2.JobEvent(job_id=job.job_id, state_changed=changed))

    async def _waiting(self) -> list[job_pb2.Job]:
        """Return the jobs that have not ended and do not run, in the order in which they are considered."""
        waiting = [job for job in await self._store.live() if job.job_id != self.running]
        # Interrupted jobs are ahead of queued ones; each in order of submission.
        return sorted(waiting, key=lambda job: (job.state == job_pb2.JOB_STATE_QUEUED, job.submitted_unix_ns))

    async def _next(self) -> job_pb2.Job | None:
        waiting = await self._waiting()
        self._waiting_ids = frozenset(job.job_id for job in waiting)
        return next((job for job in waiting if not self._lacks(job)), None)

    def _lacks(self, job: job_pb2.Job) -> str:
        if job.state != job_pb2.JOB_STATE_QUEUED:
            return ""
        supply = _supply(self._registry)
        self._started_up = self._started_up or bool(supply.trainer_ranks)
        starting_up = time.monotonic() - self._began_s < _START_UP_S and not self._started_up
        try:
            return lacking(json.loads(job.config_json), supply, starting_up=starting_up)
        except (ValueError, LookupError, TypeError):
            return ""  # its settings are not complete: it fails by itself when it runs

    async def _wait_for_change(self) -> None:
        """Return when a job was submitted or, while jobs wait for workers, when a worker may have attached."""
        if not self._waiting_ids:
            await self._submitted.wait()
            return
        submitted = asyncio.create_task(self._submitted.wait())
        attached = asyncio.create_task(self._registry.wait_for_change(1.0))
        async with cancelled_at_end(submitted, attached):
            await asyncio.wait({submitted, attached}, return_when=asyncio.FIRST_COMPLETED)


RESUMABLE = frozenset({job_pb2.JOB_STATE_STOPPED, job_pb2.JOB_STATE_FAILED})
"""End states from which a job can be resumed."""
_ALREADY_DONE = frozenset(
    {
        (controller_pb2.JOB_ACTION_CANCEL, job_pb2.JOB_STATE_CANCELLED),
        (controller_pb2.JOB_ACTION_STOP, job_pb2.JOB_STATE_STOPPED),
    }
)
_END_OF_QUEUED = {
    controller_pb2.JOB_ACTION_CANCEL: job_pb2.JOB_STATE_CANCELLED,
    controller_pb2.JOB_ACTION_STOP: job_pb2.JOB_STATE_STOPPED,
}


def _outside_of_run(job: job_pb2.Job, **fields: Any) -> controller_pb2.DescribeRunResponse:
    """Describe a job that has no run loop now."""
    saved = saved_step(json.loads(job.summary_json or "{}"))
    return controller_pb2.DescribeRunResponse(
        step=job.policy_version, saved_step=saved, save_limit_s=deadlines.CHECKPOINT_S, **fields
    )


def _supply(registry: WorkerRegistry) -> Supply:
    trainers = registry.alive(controller_pb2.WORKER_KIND_TRAINER)
    rewards = registry.alive(controller_pb2.WORKER_KIND_REWARD)
    return Supply(
        rollouts=len(registry.alive(controller_pb2.WORKER_KIND_ROLLOUT)),
        trainer_nodes=nodes_of_trainer(registry),
        weightsyncs=len(registry.alive(controller_pb2.WORKER_KIND_WEIGHTSYNC)),
        trainer_ranks=tuple(int(_info(worker.registration).get("ranks", 0)) for worker in trainers),
        rewards=tuple(served_rewards(worker.registration) for worker in rewards),
    )


def _info(registration: controller_pb2.WorkerRegistration) -> dict[str, str | int | float]:
    info: dict[str, str | int | float] = json.loads(registration.info_json or "{}")
    return info


def _name(state: job_pb2.JobState.ValueType) -> str:
    return job_pb2.JobState.Name(state).removeprefix("JOB_STATE_").lower()
