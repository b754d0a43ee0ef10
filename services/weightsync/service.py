"""WeightSyncService: gRPC in, calls on the streams out."""

from __future__ import annotations

import asyncio
import logging
import pathlib
from collections.abc import AsyncIterator
from typing import NoReturn

import grpc
import grpc.aio

from miles.rpc.gen import controller_pb2, policy_pb2, weightsync_pb2, weightsync_pb2_grpc
from miles.services.weightsync.records import Outcome, Refused, Settings, UnknownVersion
from miles.services.weightsync.segments import OutOfMemory, SegmentStore
from miles.services.weightsync.store import StateStore
from miles.services.weightsync.stream import StreamRuntime, stream_key
from miles.weights import manifest as manifests

logger = logging.getLogger(__name__)

SERVICE_NAME = weightsync_pb2.DESCRIPTOR.services_by_name["WeightSyncService"].full_name

_STREAMS = (policy_pb2.WEIGHT_STREAM_POLICY, policy_pb2.WEIGHT_STREAM_DRAFT)


class WeightSyncServicer(weightsync_pb2_grpc.WeightSyncServiceServicer):
    """All streams of all jobs."""

    def __init__(
        self,
        state_dir: pathlib.Path | None,
        directory: pathlib.Path,
        keep_bytes: bool = False,
        settings: Settings | None = None,
    ) -> None:
        """Take up the state in `state_dir` (None: nothing is kept over a restart); bytes go into `directory`.

        `keep_bytes`: whether `close` leaves the bytes for the next start, as a killed service does in any case.
        """
        self._settings = settings or Settings()
        self._keep_bytes = keep_bytes and state_dir is not None
        self._store = StateStore(state_dir)
        self._segments = SegmentStore(directory, self._store.instance, state_dir)
        self._streams: dict[str, StreamRuntime] = {}

    def start(self) -> None:
        """Restore the streams; call once, on the event loop, before serving."""
        known: set[pathlib.Path] = set()
        for key, snapshot in self._store.streams().items():
            job_id, _, name = key.rpartition("/")
            stream = next(stream for stream in _STREAMS if manifests.stream_name(stream) == name)
            known |= self._stream(job_id, stream).restore(snapshot)
        self._segments.remove_unknown(known)

    def close(self) -> None:
        """End subscriptions and free the bytes, unless they are to be kept."""
        for stream in self._streams.values():
            stream.close()
        self._segments.close(remove_all=not self._keep_bytes)
        self._store.close()

    def heartbeat(self) -> controller_pb2.WorkerHeartbeat:
        """What the controller hears: activations ended are the progress."""
        busy = [stream for stream in self._streams.values() if stream.machine.activation is not None]
        return controller_pb2.WorkerHeartbeat(
            progress=sum(stream.activations_ended for stream in self._streams.values()),
            activity="activating" if busy else "idle",
            load={"engines": sum(len(stream.machine.engines) for stream in self._streams.values())},
        )

    async def Allocate(
        self, request: weightsync_pb2.AllocateRequest, context: grpc.aio.ServicerContext
    ) -> weightsync_pb2.AllocateResponse:
        """Reserve room for a version."""
        await _check_version(request.version, context)
        if request.transport != weightsync_pb2.TRANSPORT_KIND_SHARED_MEMORY:
            await _invalid(context, f"transport is {request.transport}; this service offers SHARED_MEMORY")
        if request.nbytes == 0:
            await _invalid(context, "nbytes is 0; a version has at least one byte")
        stream = self._stream(request.version.job_id, request.version.stream)
        try:
            handle = await stream.allocate(request.version.version, request.nbytes)
        except OutOfMemory as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except Refused as error:
            await _refuse(context, "allocate", request.version, error)
        return weightsync_pb2.AllocateResponse(handle=handle)

    async def Prepare(
        self, request: weightsync_pb2.PrepareRequest, context: grpc.aio.ServicerContext
    ) -> weightsync_pb2.PrepareResponse:
        """Declare a version complete."""
        version = request.manifest.version
        await _check_version(version, context)
        try:
            await asyncio.to_thread(manifests.validate, request.manifest)  # takes a while for 10^5 tensors
            self._stream(version.job_id, version.stream).prepare(request.manifest, request.handle.shared_memory.path)
        except manifests.ManifestError as error:
            await _invalid(context, f"manifest: {error}")
        except Refused as error:
            await _refuse(context, "prepare", version, error)
        return weightsync_pb2.PrepareResponse()

    async def Activate(
        self, request: weightsync_pb2.ActivateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[weightsync_pb2.ActivateResponse]:
        """Bring every engine to a version; a failed activation ends with DEADLINE_EXCEEDED and says why."""
        version = request.version
        await _check_version(version, context)
        if not request.operation_id or request.deadline_ms == 0:
            await _invalid(context, "operation_id must not be empty and deadline_ms not 0")
        stream = self._stream(version.job_id, version.stream)
        try:
            events = stream.activate(
                version.version,
                request.operation_id,
                request.deadline_ms / 1000,
                request.min_engines,
                request.check_equal,
                request.wait_for,
            )
        except Refused as error:
            await _refuse(context, "activate", version, error)
        try:
            while not isinstance(event := await events.get(), Outcome):
                yield weightsync_pb2.ActivateResponse(engine=event)
        finally:
            stream.unwatch(events)
        if not event.ok:
            text = f"activation of {manifests.describe(version)} failed: {event.error}"
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, text)
        done = weightsync_pb2.ActivateDone(
            engines=event.engines, quarantined=event.quarantined, total_s=event.total_s, pause_s=event.pause_s
        )
        yield weightsync_pb2.ActivateResponse(done=done)

    async def Subscribe(
        self, requests: AsyncIterator[weightsync_pb2.SubscribeRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[weightsync_pb2.SubscribeResponse]:
        """Attach an engine for as long as the stream lasts."""
        first = await anext(aiter(requests), None)
        if first is None or first.WhichOneof("kind") != "hello":
            await _invalid(context, "the first message of a subscription must be a hello")
        hello = first.hello
        await _check_version(policy_pb2.WeightVersion(job_id=hello.job_id, stream=hello.stream), context)
        if not hello.engine_id:
            await _invalid(context, "engine_id is empty")
        stream = self._stream(hello.job_id, hello.stream)
        session, orders = stream.subscribe(hello)

        async def read() -> None:
            try:
                async for request in requests:
                    if request.WhichOneof("kind") == "report":
                        stream.report(hello.engine_id, session, request.report)
            finally:
                orders.put_nowait(None)

        reader = asyncio.create_task(read(), name=f"reports of {hello.engine_id}")
        try:
            while (order := await orders.get()) is not None:
                yield order
        finally:
            reader.cancel()
            stream.unsubscribe(hello.engine_id, session)

    async def ListVersions(
        self, request: weightsync_pb2.ListVersionsRequest, context: grpc.aio.ServicerContext
    ) -> weightsync_pb2.ListVersionsResponse:
        """Versions and engines of one job, or of all."""
        response = weightsync_pb2.ListVersionsResponse()
        for stream in self._streams.values():
            if request.job_id in ("", stream.job_id):
                response.versions.extend(stream.version_statuses())
                response.engines.extend(stream.engine_status(e) for e in stream.machine.engines.values())
        return response

    async def ReleaseJob(
        self, request: weightsync_pb2.ReleaseJobRequest, context: grpc.aio.ServicerContext
    ) -> weightsync_pb2.ReleaseJobResponse:
        """Free what a finished job left."""
        if not request.job_id:
            await _invalid(context, "job_id is empty")
        keys = [stream_key(request.job_id, stream) for stream in _STREAMS]
        freed = sum(self._streams[key].release() for key in keys if key in self._streams)
        return weightsync_pb2.ReleaseJobResponse(freed_bytes=freed)

    def _stream(self, job_id: str, stream: policy_pb2.WeightStream.ValueType) -> StreamRuntime:
        key = stream_key(job_id, stream)
        if key not in self._streams:
            self._streams[key] = StreamRuntime(job_id, stream, self._store, self._segments, self._settings)
        return self._streams[key]


async def _check_version(version: policy_pb2.WeightVersion, context: grpc.aio.ServicerContext) -> None:
    faults = [] if version.job_id else ["job_id is empty"]
    if version.stream not in _STREAMS:
        faults.append(f"stream is {version.stream}; allowed are POLICY and DRAFT")
    if faults:
        await _invalid(context, "; ".join(faults))


async def _invalid(context: grpc.aio.ServicerContext, text: str) -> NoReturn:
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
    raise AssertionError("abort raises")


async def _refuse(
    context: grpc.aio.ServicerContext, what: str, version: policy_pb2.WeightVersion, error: Refused
) -> NoReturn:
    unknown = isinstance(error, UnknownVersion)
    code = grpc.StatusCode.NOT_FOUND if unknown else grpc.StatusCode.FAILED_PRECONDITION
    await context.abort(code, f"cannot {what} {manifests.describe(version)}: {error}")
    raise AssertionError("abort raises")
