"""The gateway's side of the controller: calls, and their failures as problems."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Sequence
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

logger = logging.getLogger(__name__)

ANSWER_S = 10.0
"""How long the controller may take to answer."""
CHECK_S = 60.0
"""How long it may take to look at the files that a configuration names."""

T = TypeVar("T")


class ControllerClient:
    """Calls to one controller. Every failure is raised as Problem."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = connect(address)
        self._jobs = controller_pb2_grpc.ControllerServiceStub(self._channel)
        self._records = records_pb2_grpc.RecordsServiceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def check_config(self, config_json: str, refused: Sequence[str]) -> Sequence[controller_pb2.ConfigFault]:
        """What is wrong with a configuration, beside the keys that were refused already."""
        request = controller_pb2.CheckConfigRequest(config_json=config_json, refused_keys=refused)
        answer: controller_pb2.CheckConfigResponse = await _call(self._jobs.CheckConfig(request, timeout=CHECK_S))
        return answer.faults

    async def submit(self, request: controller_pb2.SubmitJobRequest) -> controller_pb2.SubmitJobResponse:
        """Store a job."""
        return await _call(self._jobs.SubmitJob(request, timeout=ANSWER_S))

    async def job(self, job_id: str) -> job_pb2.Job:
        """One job."""
        request = controller_pb2.GetJobRequest(job_id=job_id)
        answer: controller_pb2.GetJobResponse = await _call(self._jobs.GetJob(request, timeout=ANSWER_S))
        return answer.job

    async def run(self, job_id: str) -> controller_pb2.DescribeRunResponse:
        """What a job's run does now."""
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
        """A job's events as they happen; raises AioRpcError as it comes."""
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
        """Have a job's engines compare what they serve with what the trainer sent."""
        request = controller_pb2.CheckJobVersionsRequest(job_id=job_id)
        return await _call(self._jobs.CheckJobVersions(request, timeout=CHECK_S))

    async def events(self, job_id: str, after: str, limit: int) -> Sequence[job_pb2.JobEvent]:
        """A page of a job's history."""
        request = records_pb2.ListEventsRequest(job_id=job_id, after_event_id=after, page_size=limit)
        answer: records_pb2.ListEventsResponse = await _call(self._records.ListEvents(request, timeout=ANSWER_S))
        return answer.events

    async def metrics(self, request: records_pb2.ListMetricsRequest) -> records_pb2.ListMetricsResponse:
        """Series of metrics."""
        return await _call(self._records.ListMetrics(request, timeout=ANSWER_S))

    async def samples(self, request: records_pb2.ListSamplesRequest) -> records_pb2.ListSamplesResponse:
        """A page of samples."""
        return await _call(self._records.ListSamples(request, timeout=ANSWER_S))

    async def sample(self, request: records_pb2.GetSampleRequest) -> records_pb2.GetSampleResponse:
        """One sample, token by token."""
        return await _call(self._records.GetSample(request, timeout=CHECK_S))

    async def activity(self, request: records_pb2.ListActivityRequest) -> Sequence[records_pb2.ActivitySpan]:
        """Which activity went on when."""
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
        """The bytes of a file of an export, in pieces."""
        request = records_pb2.ReadExportRequest(job_id=job_id, step=step, name=name)
        try:
            async for piece in self._records.ReadExport(request):
                yield piece.data
        except grpc.aio.AioRpcError as error:
            raise as_problem(error) from error

    async def logs(self, job_id: str) -> Sequence[records_pb2.LogFile]:
        """Log files."""
        request = records_pb2.ListLogsRequest(job_id=job_id)
        answer: records_pb2.ListLogsResponse = await _call(self._records.ListLogs(request, timeout=ANSWER_S))
        return answer.files

    async def read_log(self, request: records_pb2.ReadLogRequest) -> records_pb2.ReadLogResponse:
        """A piece of a log."""
        return await _call(self._records.ReadLog(request, timeout=ANSWER_S))


async def _call(answer: Awaitable[T]) -> T:
    try:
        return await answer
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
    """The problem that a failed call is."""
    if error.code() in _AWAY:
        logger.warning("the controller does not answer: %s: %s", error.code().name, error.details())
        detail = "the controller does not answer; it may be starting again, so try once more in a moment"
        return Problem("controller-away", detail, headers={"Retry-After": "1"})
    if (kind := _KINDS.get(error.code())) is not None:
        return Problem(kind, error.details() or kind)
    logger.error("the controller failed: %s: %s", error.code().name, error.details())
    return Problem("controller-failed", "the controller failed to answer; its log says why")
