"""One job of a controller, as the launcher asks for it: its record, its events, its run, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping

import grpc.aio

from miles.launcher.stopping.stop_progress import RunSnapshot
from miles.rpc.exit_codes import ExitCode
from miles.rpc.gen import controller_pb2, controller_pb2_grpc, job_pb2
from miles.telemetry.repeated_warnings import RepeatedWarnings

logger = logging.getLogger(__name__)

EXIT_CODES: Mapping[job_pb2.JobState.ValueType, ExitCode] = {
    job_pb2.JOB_STATE_SUCCEEDED: ExitCode.OK,
    job_pb2.JOB_STATE_FAILED: ExitCode.JOB_FAILED,
    job_pb2.JOB_STATE_CANCELLED: ExitCode.JOB_CANCELLED,
    job_pb2.JOB_STATE_STOPPED: ExitCode.INTERRUPTED,
}
"""Exit code of a program that runs a job, by the state in which the job ended."""
_ANSWER_S = 2.0
"""How long the controller may take to answer while a run is being stopped."""
_RETRY_S = 0.5


class JobClient:
    """Asks one controller about one job."""

    def __init__(self, stub: controller_pb2_grpc.ControllerServiceStub, job_id: str) -> None:
        self._stub = stub
        self._job_id = job_id

    async def get(self) -> job_pb2.Job:
        """Return the job's record; wait for a controller that is restarting."""
        request = controller_pb2.GetJobRequest(job_id=self._job_id)
        response: controller_pb2.GetJobResponse = await self._stub.GetJob(request, wait_for_ready=True)
        return response.job

    async def watch(self, only_new: bool, show: Callable[[job_pb2.JobEvent, int], None]) -> job_pb2.Job:
        """Show the job's events until it has ended; continue after the last one seen when the controller restarts.

        `show` gets an event and the job's number of steps.
        """
        request = controller_pb2.WatchJobRequest(job_id=self._job_id, only_new=only_new)
        failures = RepeatedWarnings()
        while True:
            try:
                job = await self.get()
                failures = RepeatedWarnings()
                async for response in self._stub.WatchJob(request, wait_for_ready=True):
                    request = controller_pb2.WatchJobRequest(
                        job_id=self._job_id, after_event_id=response.event.event_id
                    )
                    if not job.num_rollout:
                        job = await self.get()
                    show(response.event, job.num_rollout)
                job = await self.get()
                if job.state in EXIT_CODES:
                    return job
            except grpc.aio.AioRpcError as error:
                if line := failures.note(f"the controller does not answer ({error.details()}); waiting for it"):
                    logger.warning("%s", line)
                await asyncio.sleep(_RETRY_S)

    async def describe_run(self) -> RunSnapshot | None:
        """Return the state of the job's run now; None when the controller does not answer."""
        request = controller_pb2.DescribeRunRequest(job_id=self._job_id)
        try:
            run = await self._stub.DescribeRun(request, timeout=_ANSWER_S)
        except grpc.aio.AioRpcError:
            return None
        return RunSnapshot(
            phase=run.phase,
            waiting_for=run.waiting_for,
            for_s=max(0.0, (time.time_ns() - run.since_unix_ns) / 1e9),
            step=run.step,
            saved_step=run.saved_step if run.HasField("saved_step") else None,
            save_limit_s=run.save_limit_s,
        )

    async def request_stop(self) -> None:
        """Ask for the job to be saved and stopped. A controller that does not answer must be asked again."""
        request = controller_pb2.ControlJobRequest(job_id=self._job_id, action=controller_pb2.JOB_ACTION_STOP)
        with contextlib.suppress(grpc.aio.AioRpcError):
            await self._stub.ControlJob(request, timeout=_ANSWER_S)
