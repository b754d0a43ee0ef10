"""The gRPC servicer of the weightsync service: it turns calls into calls on streams."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import pathlib
from collections.abc import AsyncIterator, Sequence

import grpc
import grpc.aio

from miles.rpc import abort
from miles.rpc.gen import controller_pb2, policy_pb2, weightsync_pb2, weightsync_pb2_grpc
from miles.services.weightsync.actions import Outcome
from miles.services.weightsync.chunk_table import ChunkTable
from miles.services.weightsync.folders import FolderStore
from miles.services.weightsync.refusals import STREAMS, check_version, invalid, refusals_as_status
from miles.services.weightsync.segments import SegmentStore
from miles.services.weightsync.store import StateStore
from miles.services.weightsync.stream import StreamRuntime, stream_key
from miles.services.weightsync.timing import PublicationLimits
from miles.telemetry.tracing import traced
from miles.weights import manifest as manifests

logger = logging.getLogger(__name__)

SERVICE_NAME = weightsync_pb2.DESCRIPTOR.services_by_name["WeightSyncService"].full_name


class WeightSyncServicer(weightsync_pb2_grpc.WeightSyncServiceServicer):
    """All streams of all jobs."""

    def __init__(
        self,
        state_dir: pathlib.Path | None,
        directory: pathlib.Path,
        keep_bytes: bool = False,
        limits: PublicationLimits | None = None,
        disk_dir: pathlib.Path | None = None,
    ) -> None:
        """Restore the state in `state_dir` (None: nothing survives a restart); bytes go into `directory`.

        `disk_dir` is a folder on storage that trainers and engines share; None: there is none.

        `keep_bytes`: whether `close` leaves the bytes for the next start, as a killed service does in any case.
        """
        self._limits = limits or PublicationLimits()
        self._keep_bytes = keep_bytes and state_dir is not None
        self._store = StateStore(state_dir)
        self._segments = SegmentStore(directory, self._store.instance, state_dir)
        self._folders = FolderStore(disk_dir, self._store.instance, state_dir)
        self._streams: dict[str, StreamRuntime] = {}

    def start(self) -> None:
        """Restore the streams; call once, on the event loop, before serving."""
        files: set[pathlib.Path] = set()
        folders: set[pathlib.Path] = set()
        for key, snapshot in self._store.streams().items():
            job_id, _, name = key.rpartition("/")
            stream = next(stream for stream in STREAMS if manifests.stream_name(stream) == name)
            known = self._stream(job_id, stream).restore(snapshot)
            files, folders = files | known[0], folders | known[1]
        self._segments.remove_unknown(files)
        in_use = {path for stream in self._streams.values() for path in stream.holdings.folders_in_use()}
        self._folders.remove_unknown(folders, in_use)

    def end_subscriptions(self) -> None:
        """End every subscription, so that the server can stop; other calls are still answered."""
        for stream in self._streams.values():
            stream.close()

    def close(self) -> None:
        """Free the bytes unless they are to be kept; no call is answered any more."""
        self.end_subscriptions()
        self._segments.close(remove_all=not self._keep_bytes)
        self._folders.close(remove_all=not self._keep_bytes)
        self._store.close()

    def heartbeat(self) -> controller_pb2.WorkerHeartbeat:
        """The heartbeat to the controller; its progress counts activations that have ended."""
        busy = [stream for stream in self._streams.values() if stream.machine.activation is not None]
        return controller_pb2.WorkerHeartbeat(
            progress=sum(stream.activations_ended for stream in self._streams.values()),
            activity="activating" if busy else "idle",
            load={"engines": sum(len(stream.machine.engines) for stream in self._streams.values())},
        )

    @traced("allocate")
    async def Allocate(
        self, request: weightsync_pb2.AllocateRequest, context: grpc.aio.ServicerContext
    ) -> weightsync_pb2.AllocateResponse:
        """Reserve room for a version."""
        await check_version(request.version, context)
        if request.nbytes == 0:
            await invalid(context, "nbytes is 0; a version has at least one byte")
        async with refusals_as_status(context, "allocate", request.version):
            return await self._stream(request.version.job_id, request.version.stream).allocate(request)
        raise AssertionError("abort raises")

    @traced("prepare version")
    async def Prepare(
        self, request: weightsync_pb2.PrepareRequest, context: grpc.aio.ServicerContext
    ) -> weightsync_pb2.PrepareResponse:
        """Declare a version complete."""
        version = request.manifest.version
        await check_version(version, context)
        async with refusals_as_status(context, "prepare", version):
            await asyncio.to_thread(manifests.validate, request.manifest)  # takes a while for 10^5 tensors
            self._stream(version.job_id, version.stream).prepare(request)
        return weightsync_pb2.PrepareResponse()

    async def Activate(
        self, request: weightsync_pb2.ActivateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[weightsync_pb2.ActivateResponse]:
        """Bring every engine to a version; a failed activation ends with DEADLINE_EXCEEDED and says why.

        One that no engine can take ends with a message of its own: repeating it cannot help.
        """
        version = request.version
        await check_version(version, context)
        if not request.operation_id or request.deadline_ms == 0:
            await invalid(context, "operation_id must not be empty and deadline_ms not 0")
        stream = self._stream(version.job_id, version.stream)
        async with refusals_as_status(context, "activate", version):
            events = stream.activate(
                version.version,
                request.operation_id,
                request.deadline_ms / 1000,
                request.min_engines,
                request.check_equal,
                request.wait_for,
            )
        with contextlib.ExitStack() as at_end:
            at_end.callback(stream.unwatch, events)
            while not isinstance(event := await events.get(), Outcome):
                yield weightsync_pb2.ActivateResponse(engine=event)
        if event.refused:
            yield weightsync_pb2.ActivateResponse(refused=weightsync_pb2.ActivateRefused(reason=event.error))
            return
        if not event.ok:
            text = f"activation of {manifests.describe(version)} failed: {event.error}"
            await abort(context, grpc.StatusCode.DEADLINE_EXCEEDED, text)
        done = weightsync_pb2.ActivateDone(
            engines=event.engines, quarantined=event.quarantined, total_s=event.total_s, pause_s=event.pause_s
        )
        yield weightsync_pb2.ActivateResponse(done=done)

    async def CheckEngines(
        self, request: weightsync_pb2.CheckEnginesRequest, context: grpc.aio.ServicerContext
    ) -> weightsync_pb2.CheckEnginesResponse:
        """Compare what engines serve with what was sent, on demand."""
        name = policy_pb2.WeightVersion(job_id=request.job_id, stream=request.stream)
        await check_version(name, context)
        if request.deadline_ms == 0:
            await invalid(context, "deadline_ms must not be 0")
        stream = self._stream(request.job_id, request.stream)
        async with refusals_as_status(context, "check engines for", name):
            number, events = stream.check(request.deadline_ms / 1000)
        with contextlib.ExitStack() as at_end:
            at_end.callback(stream.unwatch, events)
            while not isinstance(event := await events.get(), Outcome):
                pass
        if not event.ok:
            await abort(context, grpc.StatusCode.FAILED_PRECONDITION, f"the check did not finish: {event.error}")
        return weightsync_pb2.CheckEnginesResponse(
            version=number,
            equal=event.engines,
            quarantined=event.quarantined,
            engines=[stream.engine_status(engine) for engine in stream.machine.engines.values()],
        )

    async def Subscribe(
        self, requests: AsyncIterator[weightsync_pb2.SubscribeRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[weightsync_pb2.SubscribeResponse]:
        """Attach an engine until the stream ends."""
        first = await anext(aiter(requests), None)
        if first is None or first.WhichOneof("kind") != "hello":
            await invalid(context, "the first message of a subscription must be a hello")
        hello = first.hello
        await check_version(policy_pb2.WeightVersion(job_id=hello.job_id, stream=hello.stream), context)
        if not hello.engine_id:
            await invalid(context, "engine_id is empty")
        stream = self._stream(hello.job_id, hello.stream)
        session, orders = stream.subscribe(hello)

        async def read() -> None:
            async for request in requests:
                if request.WhichOneof("kind") == "report":
                    stream.report(hello.engine_id, session, request.report)

        with contextlib.ExitStack() as at_end:
            at_end.callback(stream.unsubscribe, hello.engine_id, session)
            reader = asyncio.create_task(read(), name=f"reports of {hello.engine_id}")
            reader.add_done_callback(lambda _: orders.put_nowait(None))
            at_end.callback(reader.cancel)
            leases = asyncio.create_task(self._renew_lease(orders), name=f"serving lease of {hello.engine_id}")
            at_end.callback(leases.cancel)
            while (order := await orders.get()) is not None:
                yield order

    async def DescribeTransports(
        self, request: weightsync_pb2.DescribeTransportsRequest, context: grpc.aio.ServicerContext
    ) -> weightsync_pb2.DescribeTransportsResponse:
        """Name the files by which a process finds out whether it shares memory or storage with this service.

        Also pass on what the engines of a stream share of their GPUs' memory, for its trainer.
        """
        files = {weightsync_pb2.TRANSPORT_KIND_SHARED_MEMORY: self._segments.probe}
        if self._folders.root is not None:
            files[weightsync_pb2.TRANSPORT_KIND_DISK_DELTA] = self._folders.probe
        probes = [
            weightsync_pb2.TransportProbe(kind=kind, path=str(path), token=path.read_text())
            for kind, path in files.items()
        ]
        described = weightsync_pb2.DescribeTransportsResponse(probes=probes)
        if stream := self._streams.get(stream_key(request.job_id, request.stream)):
            described.gpu_memory.extend(stream.gpu_memory())
            described.version_nbytes = max((version.nbytes for version in stream.machine.versions.values()), default=0)
        return described

    async def OfferChunks(
        self, request: weightsync_pb2.OfferChunksRequest, context: grpc.aio.ServicerContext
    ) -> weightsync_pb2.OfferChunksResponse:
        """Record the chunks of a part of a version; return which are missing."""
        await check_version(request.version, context)
        async with refusals_as_status(context, "upload", request.version):
            table = self._uploading(request.version, request.publication_id)
            missing = await asyncio.to_thread(table.offer, request.chunks)
            based = await asyncio.to_thread(_based, table, request, missing)
        return weightsync_pb2.OfferChunksResponse(missing=missing, based=based)

    async def UploadChunks(
        self, requests: AsyncIterator[weightsync_pb2.UploadChunksRequest], context: grpc.aio.ServicerContext
    ) -> weightsync_pb2.UploadChunksResponse:
        """Store chunks."""
        chunks, name, table = 0, policy_pb2.WeightVersion(), None
        async for request in requests:
            if table is None:
                name = request.version
                await check_version(name, context)
            async with refusals_as_status(context, "upload", name):
                table = table or self._uploading(name, request.publication_id)
                chunks += await asyncio.to_thread(_put, table, request)
        return weightsync_pb2.UploadChunksResponse(chunks=chunks)

    async def ListChunks(
        self, request: weightsync_pb2.ListChunksRequest, context: grpc.aio.ServicerContext
    ) -> weightsync_pb2.ListChunksResponse:
        """List the chunks of a version's buffer."""
        await check_version(request.version, context)
        async with refusals_as_status(context, "list the chunks of", request.version):
            table = self._downloading(request.version, request.publication_id)
            chunks = await asyncio.to_thread(table.listed)
        return weightsync_pb2.ListChunksResponse(chunks=chunks)

    async def FetchChunks(
        self, request: weightsync_pb2.FetchChunksRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[weightsync_pb2.FetchChunksResponse]:
        """Send chunks; gRPC's flow control keeps this no further ahead than the engine."""
        await check_version(request.version, context)
        async with refusals_as_status(context, "send", request.version):
            table = self._downloading(request.version, request.publication_id)
            await asyncio.to_thread(table.listed)
            for number, held in zip(request.chunks, request.held or itertools.repeat(b""), strict=False):
                change = table.change(number, held)
                data = await asyncio.to_thread(table.get, number) if change is None else change
                yield weightsync_pb2.FetchChunksResponse(chunk=number, data=data, is_change=change is not None)

    async def ListVersions(
        self, request: weightsync_pb2.ListVersionsRequest, context: grpc.aio.ServicerContext
    ) -> weightsync_pb2.ListVersionsResponse:
        """List versions and engines of one job, or of all."""
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
            await invalid(context, "job_id is empty")
        keys = [stream_key(request.job_id, stream) for stream in STREAMS]
        freed = sum(self._streams[key].release() for key in keys if key in self._streams)
        return weightsync_pb2.ReleaseJobResponse(freed_bytes=freed)

    async def _renew_lease(self, orders: asyncio.Queue[weightsync_pb2.SubscribeResponse | None]) -> None:
        """Renew an engine's serving lease again and again."""
        lease_s = self._limits.serving_lease_s
        lease = weightsync_pb2.ServingLease(lease_ms=round(lease_s * 1000))
        while True:
            orders.put_nowait(weightsync_pb2.SubscribeResponse(serving_lease=lease))
            await asyncio.sleep(lease_s / 3)

    def _uploading(self, version: policy_pb2.WeightVersion, publication_id: int) -> ChunkTable:
        return self._stream(version.job_id, version.stream).uploading(publication_id)

    def _downloading(self, version: policy_pb2.WeightVersion, publication_id: int) -> ChunkTable:
        return self._stream(version.job_id, version.stream).downloading(publication_id)

    def _stream(self, job_id: str, stream: policy_pb2.WeightStream.ValueType) -> StreamRuntime:
        key = stream_key(job_id, stream)
        if key not in self._streams:
            self._streams[key] = StreamRuntime(job_id, stream, self._store, self._segments, self._folders, self._limits)
        return self._streams[key]


def _based(table: ChunkTable, request: weightsync_pb2.OfferChunksRequest, missing: Sequence[int]) -> list[int]:
    """Positions of missing chunks that a change to a chunk of the service makes."""
    bases = request.base_ids
    return [
        number for number in missing if number < len(bases) and table.has_base(request.chunks[number], bases[number])
    ]


def _put(table: ChunkTable, request: weightsync_pb2.UploadChunksRequest) -> int:
    """Store a chunk that has come; return 1, or 0 when it came as a change of a chunk that is gone."""
    if request.base_id:
        return int(table.put_change(request.chunk, request.base_id, request.data))
    table.put(request.chunk, request.data)
    return 1
