"""What users ask of the weight-sync service, passed on by the controller, which knows where it is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc
import grpc.aio

from miles.rpc import abort, connect
from miles.rpc.gen import controller_pb2, policy_pb2, weightsync_pb2, weightsync_pb2_grpc
from miles.services.controller.workers.registry import WorkerRegistry

_ANSWER_S = 5.0
_CHECK_S = 50.0
"""How long engines may take to hash what they serve."""

T = TypeVar("T")


class WeightsLink:
    """Calls to the weight-sync service that is attached."""

    def __init__(self, registry: WorkerRegistry) -> None:
        self._registry = registry

    async def versions(self, job_id: str, context: grpc.aio.ServicerContext) -> weightsync_pb2.ListVersionsResponse:
        """A job's versions and engines."""
        request = weightsync_pb2.ListVersionsRequest(job_id=job_id)
        return await self._ask(lambda stub: stub.ListVersions(request, timeout=_ANSWER_S), context)

    async def check(self, job_id: str, context: grpc.aio.ServicerContext) -> weightsync_pb2.CheckEnginesResponse:
        """Have a job's engines compare what they serve of the policy with what was sent."""
        request = weightsync_pb2.CheckEnginesRequest(
            job_id=job_id, stream=policy_pb2.WEIGHT_STREAM_POLICY, deadline_ms=int(_CHECK_S * 1000)
        )
        return await self._ask(lambda stub: stub.CheckEngines(request, timeout=_CHECK_S + _ANSWER_S), context)

    async def _ask(
        self,
        call: Callable[[weightsync_pb2_grpc.WeightSyncServiceStub], Awaitable[T]],
        context: grpc.aio.ServicerContext,
    ) -> T:
        services = self._registry.alive(controller_pb2.WORKER_KIND_WEIGHTSYNC)
        if not services:
            await abort(context, grpc.StatusCode.FAILED_PRECONDITION, "no weight-sync service is attached; start one")
        try:
            async with connect(services[0].registration.address) as channel:
                return await call(weightsync_pb2_grpc.WeightSyncServiceStub(channel))
        except grpc.aio.AioRpcError as error:
            failure = error.code(), f"the weight-sync service: {error.details()}"
        return await abort(context, *failure)
