"""Client of the controller: one method per call; failures are raised as problems."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from typing import TypeVar

import grpc
import grpc.aio

from miles.gateway.problems import Problem
from miles.rpc import connect
from miles.rpc.gen import (
    controller_pb2,
    controller_pb2_grpc,
    job_pb2,
    records_pb2,
    records_pb2_grpc,
    weightsync_pb2,
)
from miles.rpc.refusals import cause

logger = logging.getLogger(__name__)

ANSWER_S = 10.0
"""Deadline of calls to the controller, in seconds."""
CHECK_S = 60.0
"""Deadline of calls that read files or ask engines, in seconds."""

T = TypeVar("T")


class ControllerClient:
    """Calls to one controller. Every failure is raised as Problem, except those of `watch`."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = connect(address)
        self._jobs = controller_pb2_grpc.ControllerServiceStub(self._channel)
        self._records = records_pb2_grpc.RecordsServiceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def check_config(self, config_json: str, refused: Sequence[str]) -> Sequence[controller_pb2.ConfigFault]:
        """Return the faults of a configuration, except those of keys that were refused already."""
        request = controller_pb2.CheckConfigRequest(config_json=config_json, refused_keys=refused)
        answer: controller_pb2.CheckConfigResponse = await _call(self._jobs.CheckConfig(request, timeout=CHECK_S))
        return answer.faults

    async def submit(self, request: controller_pb2.SubmitJobRequest) -> controller_pb2.SubmitJobResponse:
        """Submit a job."""
        return await _call(self._jobs.SubmitJob(request, timeout=ANSWER_S))

    async def job(self, job_id: str) -> job_pb2.Job:
        """One job."""
        request = controller_pb2.GetJobRequest(job_id=job_id)
        answer: controller_pb2.GetJobResponse = await _call(self._jobs.GetJob(request, timeout=ANSWER_S))
        return answer.job

    async def run(self, job_id: str) -> controller_pb2.DescribeRunResponse:
        """Return the current state of a job's run."""
        return await _call(self._jobs.DescribeRun(controller_pb2.DescribeRunRequest(job_id=job_id), timeout=ANSWER_S))

    async def jobs(
        self, states: Sequence[job_pb2.JobState.ValueType], limit: int, cursor: str
    ) -> controller_pb2.ListJobsResponse:
        """A page of jobs, newest first."""
        request = controller_pb2.ListJobsRequest(states=states, page_size=limit, page_token=cursor)
        return await _call(self._jobs.ListJobs(request, timeout=ANSWER_S))

    async def control(self, job_id: str, action: controller_pb2.JobAction.ValueType, operation_id: str) -> job_pb2.Job:
        """Act on a job."""
        request = controller_pb2.ControlJobRequest(job_id=job_id, action=action, operation_id=operation_id)
        answer: controller_pb2.ControlJobResponse = await _call(self._jobs.ControlJob(request, timeout=ANSWER_S))
        return answer.job

    def watch(self, request: controller_pb2.WatchJobRequest) -> AsyncIterator[controller_pb2.WatchJobResponse]:
        """Yield a job's events as they happen. Raises AioRpcError."""
        stream: AsyncIterator[controller_pb2.WatchJobResponse] = self._jobs.WatchJob(request)
        return stream

    async def workers(self) -> Sequence[controller_pb2.Worker]:
        """Every worker."""
        request = controller_pb2.ListWorkersRequest()
        answer: controller_pb2.ListWorkersResponse = await _call(self._jobs.ListWorkers(request, timeout=ANSWER_S))
        return answer.workers

    async def versions(self, job_id: str) -> weightsync_pb2.ListVersionsResponse:
        """Versions of a job's weights, and the engines that hold them."""
        request = controller_pb2.ListJobVersionsRequest(job_id=job_id)
        return await _call(self._jobs.ListJobVersions(request, timeout=ANSWER_S))

    async def check_versions(self, job_id: str) -> weightsync_pb2.CheckEnginesResponse:
        """Make a job's engines compare their weights with those that the trainer sent."""
        request = controller_pb2.CheckJobVersionsRequest(job_id=job_id)
        return await _call(self._jobs.CheckJobVersions(request, timeout=CHECK_S))

    async def events(self, job_id: str, after: str, limit: int) -> Sequence[job_pb2.JobEvent]:
        """A page of a job's history."""
        request = records_pb2.ListEventsRequest(job_id=job_id, after_event_id=after, page_size=limit)
        answer: records_pb2.ListEventsResponse = await _call(self._records.ListEvents(request, timeout=ANSWER_S))
        return answer.events

    async def metrics(self, request: records_pb2.ListMetricsRequest) -> records_pb2.ListMetricsResponse:
        """Return per-step metrics."""
        return await _call(self._records.ListMetrics(request, timeout=ANSWER_S))

    async def samples(self, request: records_pb2.ListSamplesRequest) -> records_pb2.ListSamplesResponse:
        """A page of samples."""
        return await _call(self._records.ListSamples(request, timeout=ANSWER_S))

    async def sample(self, request: records_pb2.GetSampleRequest) -> records_pb2.GetSampleResponse:
        """Return one sample with per-token values."""
        return await _call(self._records.GetSample(request, timeout=CHECK_S))

    async def activity(self, request: records_pb2.ListActivityRequest) -> Sequence[records_pb2.ActivitySpan]:
        """Return activities over time."""
        answer: records_pb2.ListActivityResponse = await _call(self._records.ListActivity(request, timeout=ANSWER_S))
        return answer.spans

    async def checkpoints(self, job_id: str) -> Sequence[records_pb2.Checkpoint]:
        """Checkpoints, newest first."""
        request = records_pb2.ListCheckpointsRequest(job_id=job_id)
        answer: records_pb2.ListCheckpointsResponse = await _call(
            self._records.ListCheckpoints(request, timeout=ANSWER_S)
        )
        return answer.checkpoints

    async def read_export(self, job_id: str, step: int, name: str) -> AsyncIterator[bytes]:
        """Yield the bytes of a file of an export, in pieces."""
        request = records_pb2.ReadExportRequest(job_id=job_id, step=step, name=name)
        with _errors_as_problems():
            async for piece in self._records.ReadExport(request):
                yield piece.data

    async def logs(self, job_id: str) -> Sequence[records_pb2.LogFile]:
        """Log files."""
        request = records_pb2.ListLogsRequest(job_id=job_id)
        answer: records_pb2.ListLogsResponse = await _call(self._records.ListLogs(request, timeout=ANSWER_S))
        return answer.files

    async def read_log(self, request: records_pb2.ReadLogRequest) -> records_pb2.ReadLogResponse:
        """Return part of a log."""
        return await _call(self._records.ReadLog(request, timeout=ANSWER_S))


async def _call(answer: Awaitable[T]) -> T:
    with _errors_as_problems():
        return await answer


@contextlib.contextmanager
def _errors_as_problems() -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise as_problem(error) from error


_KINDS = {
    grpc.StatusCode.NOT_FOUND: "unknown-job",
    grpc.StatusCode.INVALID_ARGUMENT: "invalid-request",
    grpc.StatusCode.FAILED_PRECONDITION: "not-possible-now",
    grpc.StatusCode.ALREADY_EXISTS: "conflict",
}
_AWAY = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED})


def as_problem(error: grpc.aio.AioRpcError) -> Problem:
    """Return the problem document of a failed call."""
    if (never := cause(error.code(), error.details() or "")) is not None:
        logger.error("the controller cannot be used: %s (%s)", never[1], error.details())
        return Problem("controller-failed", f"the controller cannot be used: {never[1]}")
    if error.code() in _AWAY:
        logger.warning("the controller does not answer: %s: %s", error.code().name, error.details())
        detail = "the controller does not answer; it may be restarting, so try again in a moment"
        return Problem("controller-away", detail, headers={"Retry-After": "1"})
    if (kind := _KINDS.get(error.code())) is not None:
        return Problem(kind, error.details() or kind)
    logger.error("the controller failed: %s: %s", error.code().name, error.details())
    return Problem("controller-failed", "the controller failed to answer; its log says why")
