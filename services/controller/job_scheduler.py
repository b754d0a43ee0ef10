"""Which job runs now: one at a time, in order of submission; a job that a restart interrupted goes first."""

from __future__ import annotations

import asyncio
import logging

from miles.rpc.gen import controller_pb2, job_pb2
from miles.services.controller.job_controls import JobControls
from miles.services.controller.job_runner import JobRunner
from miles.services.controller.records import ENDED, JobStore

logger = logging.getLogger(__name__)


class JobScheduler:
    """Takes jobs from the store and runs them."""

    def __init__(self, store: JobStore, runner: JobRunner) -> None:
        self._store = store
        self._runner = runner
        self._submitted = asyncio.Event()
        self._controls: dict[str, JobControls] = {}

    def wake(self) -> None:
        """A job was submitted."""
        self._submitted.set()

    async def run(self) -> None:
        """Run jobs until cancelled."""
        while True:
            self._submitted.clear()
            job = await self._next()
            if job is None:
                await self._submitted.wait()
                continue
            logger.info("running job %s", job.job_id)
            controls = self._controls.setdefault(job.job_id, JobControls())
            await self._runner.run(job, controls)
            del self._controls[job.job_id]

    async def control(self, job_id: str, action: controller_pb2.JobAction.ValueType, operation_id: str) -> job_pb2.Job:
        """Apply an action to a job. Raises `UnknownJobError`, and `ValueError` for a job that has ended."""
        job = await self._store.get(job_id)
        if job.state in ENDED:
            name = job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_").lower()
            raise ValueError(f"job {job_id} has ended ({name}); submit it again to resume or repeat it")
        self._controls.setdefault(job_id, JobControls()).apply(action, operation_id)
        return job

    async def _next(self) -> job_pb2.Job | None:
        waiting: list[job_pb2.Job] = []
        token = ""
        while True:
            page, token = await self._store.list(page_token=token)
            waiting += [job for job in page if job.state not in ENDED]
            if not token:
                break
        # Interrupted jobs are ahead of queued ones; each in order of submission.
        waiting.sort(key=lambda job: (job.state == job_pb2.JOB_STATE_QUEUED, job.submitted_unix_ns))
        return waiting[0] if waiting else None
