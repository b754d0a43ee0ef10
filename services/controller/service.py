"""The controller's gRPC service for users, the gateway and workers: gRPC in, plain calls out."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import grpc
import grpc.aio

from miles.config import JobConfig
from miles.config.resume_rules import changes
from miles.ownership.overlap import OUTPUTS
from miles.rpc import abort
from miles.rpc.gen import controller_pb2, controller_pb2_grpc, job_pb2, weightsync_pb2
from miles.services.controller.clients.weightsync import WeightSyncClient
from miles.services.controller.errors import NotPossibleNowError, ending_call
from miles.services.controller.jobs.config_check import check_config
from miles.services.controller.jobs.scheduler import JobScheduler
from miles.services.controller.jobs.store import JobStore, check_event_id, new_job
from miles.services.controller.status.worker_overview import WorkerOverview
from miles.services.controller.workers.registry import AttachedWorker, WorkerRegistry


class ControllerServicer(controller_pb2_grpc.ControllerServiceServicer):
    """Serves users, the gateway and workers."""

    def __init__(self, store: JobStore, scheduler: JobScheduler, registry: WorkerRegistry) -> None:
        self._store = store
        self._scheduler = scheduler
        self._registry = registry
        self._workers = WorkerOverview(registry)

    async def CheckConfig(
        self, request: controller_pb2.CheckConfigRequest, context: grpc.aio.ServicerContext
    ) -> controller_pb2.CheckConfigResponse:
        faults = await asyncio.to_thread(check_config, request.config_json, frozenset(request.refused_keys))
        if any(fault.field in OUTPUTS for fault in faults):
            async with ending_call(context):  # that a job writes there now says more than whose the folder is
                await self._store.refuse_shared(job_pb2.Job(config_json=request.config_json), but_its_own=True)
        return controller_pb2.CheckConfigResponse(
            faults=[
                controller_pb2.ConfigFault(
                    field=fault.field,
                    value_json=json.dumps(fault.value, default=str),
                    problem=fault.problem,
                    remedy=fault.remedy,
                )
                for fault in faults
            ]
        )

    async def SubmitJob(
        self, request: controller_pb2.SubmitJobRequest, context: grpc.aio.ServicerContext
    ) -> controller_pb2.SubmitJobResponse:
        async with ending_call(context):
            config = JobConfig.from_json_here(request.config_json)
            flat = config.to_flat()
            record = new_job(flat, config.data.num_rollout or 0, request.submitted_by)
            job, created = await self._store.submit(record, request.request_id, is_run=not request.only_new)
            was, now, resumed = json.loads(job.config_json), json.loads(json.dumps(flat)), False
            if not created and not request.only_new:
                job, resumed = await self._scheduler.go_on(job.job_id, now)
        self._scheduler.wake()
        return controller_pb2.SubmitJobResponse(
            job=job, created=created, differs=was != now, changes=map(str, changes(was, now)), resumed=resumed
        )

    async def GetJob(
        self, request: controller_pb2.GetJobRequest, context: grpc.aio.ServicerContext
    ) -> controller_pb2.GetJobResponse:
        async with ending_call(context):
            job = await self._store.get(request.job_id)
        job.waits.extend(self._scheduler.waits(job))
        return controller_pb2.GetJobResponse(job=job)

    async def ListJobs(
        self, request: controller_pb2.ListJobsRequest, context: grpc.aio.ServicerContext
    ) -> controller_pb2.ListJobsResponse:
        size = min(request.page_size or 100, 1000)
        async with ending_call(context):
            jobs, token = await self._store.list(frozenset(request.states), size, request.page_token)
        for job in jobs:
            job.waits.extend(self._scheduler.waits(job))
        return controller_pb2.ListJobsResponse(jobs=jobs, next_page_token=token)

    async def ControlJob(
        self, request: controller_pb2.ControlJobRequest, context: grpc.aio.ServicerContext
    ) -> controller_pb2.ControlJobResponse:
        if request.action == controller_pb2.JOB_ACTION_UNSPECIFIED:
            await abort(context, grpc.StatusCode.INVALID_ARGUMENT, "action is not set; name one of JobAction")
        async with ending_call(context):
            await self._store.get(request.job_id)
            job = await self._scheduler.control(request.job_id, request.action, request.operation_id)
        return controller_pb2.ControlJobResponse(job=job)

    async def WatchJob(
        self, request: controller_pb2.WatchJobRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[controller_pb2.WatchJobResponse]:
        async with ending_call(context):
            await self._store.get(request.job_id)
            after = request.after_event_id
            if request.only_new or request.newest:
                skip = 0 if request.only_new else min(request.newest, 100_000)
                after = await self._store.newest_event_id(request.job_id, skip)
            check_event_id(after)
        async for event in self._store.watch(request.job_id, after):
            yield controller_pb2.WatchJobResponse(event=event)

    async def Attach(
        self, request_iterator: AsyncIterator[controller_pb2.AttachRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[controller_pb2.AttachResponse]:
        worker: AttachedWorker | None = None
        try:
            async for request in request_iterator:
                if request.HasField("registration"):
                    worker = self._registry.attach(request.registration)
                    yield self._attached(worker)
                elif worker is None:
                    await abort(context, grpc.StatusCode.FAILED_PRECONDITION, "heartbeat before registration")
                elif not self._registry.beat(worker, request.heartbeat):
                    await abort(
                        context,
                        grpc.StatusCode.ABORTED,
                        f"worker lease {worker.lease_number} has ended; attach again for a new one",
                    )
                while worker is not None and worker.traces:
                    yield self._attached(worker, worker.traces.pop(0))
        finally:
            if worker is not None:
                self._registry.detach(worker)

    def _attached(
        self, worker: AttachedWorker, trace: controller_pb2.TraceOrder | None = None
    ) -> controller_pb2.AttachResponse:
        return controller_pb2.AttachResponse(
            lease_number=worker.lease_number,
            lease_ttl_ms=int(self._registry.ttl_s * 1000),
            heartbeat_interval_ms=int(self._registry.heartbeat_interval_s * 1000),
            trace=trace,
        )

    async def ListWorkers(
        self, request: controller_pb2.ListWorkersRequest, context: grpc.aio.ServicerContext
    ) -> controller_pb2.ListWorkersResponse:
        workers = await self._workers.describe(self._scheduler.running)
        return controller_pb2.ListWorkersResponse(workers=workers)

    async def ListJobVersions(
        self, request: controller_pb2.ListJobVersionsRequest, context: grpc.aio.ServicerContext
    ) -> weightsync_pb2.ListVersionsResponse:
        async with ending_call(context):
            await self._store.get(request.job_id)
            with contextlib.closing(self._weightsync()) as weightsync:
                return await weightsync.list_versions(request.job_id)

    async def CheckJobVersions(
        self, request: controller_pb2.CheckJobVersionsRequest, context: grpc.aio.ServicerContext
    ) -> weightsync_pb2.CheckEnginesResponse:
        async with ending_call(context):
            await self._store.get(request.job_id)
            with contextlib.closing(self._weightsync()) as weightsync:
                return await weightsync.check_engines(request.job_id)

    async def DescribeRun(
        self, request: controller_pb2.DescribeRunRequest, context: grpc.aio.ServicerContext
    ) -> controller_pb2.DescribeRunResponse:
        async with ending_call(context):
            return await self._scheduler.describe(await self._store.get(request.job_id))

    def _weightsync(self) -> WeightSyncClient:
        services = self._registry.alive(controller_pb2.WORKER_KIND_WEIGHTSYNC)
        if not services:
            raise NotPossibleNowError("no weight-sync service is attached; start one")
        return WeightSyncClient(services[0])
