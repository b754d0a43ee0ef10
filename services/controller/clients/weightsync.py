"""The controller's client of the weight-sync service."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence

import grpc.aio

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

_NAMES = {policy_pb2.WEIGHT_STREAM_POLICY: "", policy_pb2.WEIGHT_STREAM_DRAFT: "draft "}


class WeightSyncClient:
    """Calls to one weight-sync service.

    What a run asks for raises WorkerLostError or WorkerFailedError. What users ask for raises grpc.aio.AioRpcError as
    the service sent it, for a caller who passes the status on.

    It has a connection from its first call until `close`: to open one takes milliseconds of every step.
    """

    def __init__(self, worker: AttachedWorker) -> None:
        self.worker = worker
        self.worker_id = worker.worker_id
        self.address = worker.registration.address
        self._connection = contextlib.ExitStack()
        self._channel: grpc.aio.Channel | None = None

    def close(self) -> None:
        """Close the connection; a later call opens another."""
        self._channel = None
        self._connection.close()

    async def activate(
        self,
        job_id: str,
        version: int,
        *,
        min_engines: int,
        wait_for: Sequence[str],
        check_equal: bool,
        on_engine: Callable[[weightsync_pb2.EngineStatus], Awaitable[None]],
        stream_kind: policy_pb2.WeightStream.ValueType = policy_pb2.WEIGHT_STREAM_POLICY,
    ) -> None:
        """Activate a prepared version on every engine and wait for those named; `on_engine` gets their stages.

        Raises WorkerLostError when too few did, and WeightsRefusedError when none ever will.
        """
        request = weightsync_pb2.ActivateRequest(
            version=policy_pb2.WeightVersion(job_id=job_id, stream=stream_kind, version=version),
            operation_id=uuid.uuid4().hex,
            deadline_ms=int(deadlines.ACTIVATE_S * 1000),
            min_engines=min_engines,
            wait_for=wait_for,
            check_equal=check_equal,
        )
        what = f"activation of {_NAMES[stream_kind]}version {version}"
        with self._stub() as stub:
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
        with self._stub() as stub:
            request = weightsync_pb2.ReleaseJobRequest(job_id=job_id)
            await call(stub.ReleaseJob(request), "release of the job's weights", deadlines.STOP_JOB_S)

    async def list_versions(
        self, job_id: str, deadline_s: float = deadlines.LIST_VERSIONS_S
    ) -> weightsync_pb2.ListVersionsResponse:
        """List a job's versions and engines."""
        with self._stub() as stub:
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
        with self._stub() as stub:
            answer: weightsync_pb2.CheckEnginesResponse = await stub.CheckEngines(request, timeout=timeout_s)
            return answer

    @contextlib.contextmanager
    def _stub(self) -> Iterator[weightsync_pb2_grpc.WeightSyncServiceStub]:
        if self._channel is None:
            self._channel = self._connection.enter_context(connected(self.address))
        try:
            yield weightsync_pb2_grpc.WeightSyncServiceStub(self._channel)
        except (grpc.aio.AioRpcError, WorkerLostError):
            self.close()  # a connection that broke waits before it tries again; a new one does not
            raise
