"""The controller's client of the weight-sync service."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from miles.rpc import connected
from miles.rpc.gen import policy_pb2, weightsync_pb2, weightsync_pb2_grpc
from miles.services.controller.clients import deadlines
from miles.services.controller.clients.calls import (
    WeightsRefusedError,
    WorkerFailedError,
    WorkerLostError,
    call,
    stream,
)
from miles.services.controller.workers.registry import AttachedWorker

logger = logging.getLogger(__name__)


class WeightSyncClient:
    """Calls to one weight-sync service.

    What a run asks for raises WorkerLostError or WorkerFailedError. What users ask for raises grpc.aio.AioRpcError as
    the service sent it, for a caller who passes the status on.
    """

    def __init__(self, worker: AttachedWorker) -> None:
        self.worker_id = worker.worker_id
        self.address = worker.registration.address

    async def activate(
        self,
        job_id: str,
        version: int,
        *,
        min_engines: int,
        wait_for: Sequence[str],
        check_equal: bool,
        on_engine: Callable[[weightsync_pb2.EngineStatus], Awaitable[None]],
    ) -> None:
        """Activate a prepared version on every engine and wait for those named; `on_engine` gets their stages.

        Raises WorkerLostError when too few did, and WeightsRefusedError when none ever will.
        """
        request = weightsync_pb2.ActivateRequest(
            version=policy_pb2.WeightVersion(job_id=job_id, stream=policy_pb2.WEIGHT_STREAM_POLICY, version=version),
            operation_id=uuid.uuid4().hex,
            deadline_ms=int(deadlines.ACTIVATE_S * 1000),
            min_engines=min_engines,
            wait_for=wait_for,
            check_equal=check_equal,
        )
        what = f"activation of version {version}"
        async with self._stub() as stub:
            try:
                async for message in stream(stub.Activate(request), what, deadlines.ACTIVATE_S + 10):
                    if message.HasField("done"):
                        return
                    if message.HasField("refused"):
                        raise WeightsRefusedError(message.refused.reason)
                    logger.debug("%s: %s", what, message.engine)
                    await on_engine(message.engine)
            except WeightsRefusedError:
                raise
            except WorkerFailedError as error:  # the run is loaded again, and publishes the version again
                raise WorkerLostError(str(error)) from error
        raise WorkerLostError(f"{what}: the stream ended before the version was active")

    async def release_job(self, job_id: str) -> None:
        """Free every version of a job."""
        async with self._stub() as stub:
            request = weightsync_pb2.ReleaseJobRequest(job_id=job_id)
            await call(stub.ReleaseJob(request), "release of the job's weights", deadlines.STOP_JOB_S)

    async def list_versions(
        self, job_id: str, deadline_s: float = deadlines.LIST_VERSIONS_S
    ) -> weightsync_pb2.ListVersionsResponse:
        """List a job's versions and engines."""
        async with self._stub() as stub:
            request = weightsync_pb2.ListVersionsRequest(job_id=job_id)
            answer: weightsync_pb2.ListVersionsResponse = await stub.ListVersions(request, timeout=deadline_s)
            return answer

    async def check_engines(self, job_id: str) -> weightsync_pb2.CheckEnginesResponse:
        """Have a job's engines compare the policy that they serve with what was sent."""
        request = weightsync_pb2.CheckEnginesRequest(
            job_id=job_id,
            stream=policy_pb2.WEIGHT_STREAM_POLICY,
            deadline_ms=int(deadlines.CHECK_ENGINES_S * 1000),
        )
        timeout_s = deadlines.CHECK_ENGINES_S + deadlines.LIST_VERSIONS_S
        async with self._stub() as stub:
            answer: weightsync_pb2.CheckEnginesResponse = await stub.CheckEngines(request, timeout=timeout_s)
            return answer

    @asynccontextmanager
    async def _stub(self) -> AsyncIterator[weightsync_pb2_grpc.WeightSyncServiceStub]:
        with connected(self.address) as channel:
            yield weightsync_pb2_grpc.WeightSyncServiceStub(channel)
