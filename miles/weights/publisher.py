"""The trainer's side of weight updates: send a version to where the engines can get it and declare it complete."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from miles.rpc.gen import policy_pb2, weightsource_pb2, weightsync_pb2
from miles.telemetry.tracing import traced
from miles.weights import manifest as manifests
from miles.weights.base import Endpoint, SendTimes, WeightTransport
from miles.weights.bucketing import buckets, check_exhausted
from miles.weights.dtypes import wire_dtype
from miles.weights.registry import create_transport
from miles.weights.transports.cuda_ipc.probe import merge_opened, open_probes
from miles.weights.transports.names import checksum_kind
from miles.weights.usable_transports import engines_by_gpu, fits_gpu_memory, usable_transports

if TYPE_CHECKING:
    from miles.rpc.gen.weightsync_pb2 import DeltaEncoding, TransportKind
    from miles.rpc.gen.weightsync_pb2_grpc import WeightSyncServiceStub

Layout = Sequence[tuple[str, torch.dtype, tuple[int, ...]]]
"""Name, dtype and shape of every tensor, in the order in which they will be sent."""

OpenGpuMemory = Callable[[Sequence[weightsource_pb2.GpuMemoryProbe], torch.device], weightsource_pb2.OpenedGpuMemory]
"""Finds out with which engines a trainer on this device can share GPU memory."""

BUCKET_BYTES = 512 << 20
"""Default size of a bucket, in bytes."""


@dataclasses.dataclass(frozen=True, slots=True)
class PublishResult:
    """A version that is PREPARED; times in seconds."""

    manifest: policy_pb2.Manifest
    handles: tuple[weightsync_pb2.TransportHandle, ...]
    allocate_s: float
    copy_s: float
    checksum_s: float
    total_s: float
    written_bytes: int

    @property
    def handle(self) -> weightsync_pb2.TransportHandle:
        """The first of the handles."""
        return self.handles[0]

    @property
    def total_bytes(self) -> int:
        """Size of the version's buffer, in bytes."""
        return self.manifest.total_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class DeltaSettings:
    """How versions are written to shared storage."""

    encoding: DeltaEncoding.ValueType = weightsync_pb2.DELTA_ENCODING_XOR
    full_every: int = 0
    """Write a full version every so many versions, a count; 0 lets the service choose."""


@dataclasses.dataclass(slots=True)
class PendingVersion:
    """A version that is being published: allocated, and not complete yet."""

    name: policy_pb2.WeightVersion
    train_step: int
    descriptors: list[policy_pb2.TensorDescriptor]
    total_bytes: int
    handles: list[weightsync_pb2.TransportHandle]
    live: list[int]
    """Publications that an engine may still ask for."""
    began_s: float
    allocate_s: float
    lora: policy_pb2.LoraAdapter | None = None
    """Set when the tensors are an adapter's."""
    usable: Sequence[TransportKind.ValueType] = ()
    """Transports that the trainer can use."""


class WeightSender:
    """The transports of one trainer rank, each created at first use."""

    def __init__(self, endpoint: Endpoint | None = None) -> None:
        self._endpoint = endpoint or Endpoint()
        self._transports: dict[int, WeightTransport] = {}

    def transport(self, kind: TransportKind.ValueType) -> WeightTransport:
        """The transport of that kind."""
        if kind not in self._transports:
            self._transports[kind] = create_transport(kind, self._endpoint)
        return self._transports[kind]

    def send(
        self,
        handles: Sequence[weightsync_pb2.TransportHandle],
        bucket: Sequence[policy_pb2.TensorDescriptor],
        tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        lasting: bool = False,
    ) -> SendTimes:
        """Send one bucket by every handle's transport. With several, its tensors are first read into a list.

        `lasting`: see `WeightTransport.send`.
        """
        if len(handles) > 1:
            tensors = list(tensors)
        times = SendTimes()
        with torch.no_grad():
            for handle in handles:
                times += self.transport(handle.kind).send(handle, bucket, tensors, lasting=lasting)
        return times

    def trim(self, live: Sequence[int] | None) -> None:
        """Free what is kept for publications that are not live; None: for those that were visibly freed."""
        for transport in self._transports.values():
            transport.trim(live)

    def discard(self, handles: Iterable[weightsync_pb2.TransportHandle]) -> None:
        """Undo the sends of a version that will not be completed."""
        for handle in handles:
            self.transport(handle.kind).discard(handle)

    def close(self) -> None:
        """Close the transports."""
        for transport in self._transports.values():
            transport.close()
        self._transports.clear()


class WeightPublisher:
    """Publishes the versions of one stream of one job. It blocks; call it from a worker thread, one call at a time."""

    def __init__(
        self,
        stub: WeightSyncServiceStub,
        job_id: str,
        stream: policy_pb2.WeightStream.ValueType = policy_pb2.WEIGHT_STREAM_POLICY,
        transport: TransportKind.ValueType = weightsync_pb2.TRANSPORT_KIND_UNSPECIFIED,
        deadline_s: float = 120.0,
        *,
        endpoint: Endpoint | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        delta: DeltaSettings | None = None,
        open_gpu_memory: OpenGpuMemory = open_probes,
    ) -> None:
        """`stub` is a blocking one (over grpc.Channel); `deadline_s` bounds each call to the service, in seconds.

        `transport` UNSPECIFIED lets the service choose, which knows what each engine can use. `open_gpu_memory` finds
        out, for `publish`, which engines this trainer can share GPU memory with.
        """
        self._delta = delta or DeltaSettings()
        self._stub = stub
        self._job_id = job_id
        self._stream = stream
        self._kind = transport
        self._deadline_s = deadline_s
        self._bucket_bytes = bucket_bytes
        self._device = (endpoint or Endpoint()).device
        self.sender = WeightSender(endpoint)
        self._usable: Sequence[TransportKind.ValueType] | None = None
        """Transports that this process can use; None before the first version, and after one that failed."""
        self._open_gpu_memory = open_gpu_memory
        self._opened = weightsource_pb2.OpenedGpuMemory()
        """Attached engines that can share GPU memory with every rank."""
        self._tried: set[bytes] = set()
        """Tokens of the engines for which that is known, whether they can or not."""

    def publish(
        self,
        version: int,
        train_step: int,
        layout: Layout,
        tensors: Iterable[tuple[str, torch.Tensor]],
        lora: policy_pb2.LoraAdapter | None = None,
    ) -> PublishResult:
        """Allocate, send and prepare a version, so that it can be activated.

        `lora`: the tensors are an adapter's, by PEFT's names. `tensors` must follow `layout` in names, order and shapes
        (else ManifestError); dtypes are converted to the layout's. Publishing a number again replaces a version that
        was not activated and leaves one that was. Raises grpc.RpcError when the service refuses or does not answer in
        time, and OSError when there is no room for the bytes.
        """
        if untried := self.untried_engines(layout):
            self.opened(untried, [self._open_gpu_memory(untried, self._device)])
        pending = self.begin(version, train_step, layout, lora)
        with self.discarding_on_failure(pending):
            times = SendTimes()
            source = iter(tensors)
            for bucket in buckets(pending.descriptors, self._bucket_bytes):
                times += self.sender.send(pending.handles, bucket, itertools.islice(source, len(bucket)))
            check_exhausted(source)
            return self.finish(pending, times)

    @traced("look for engines")
    def untried_engines(self, layout: Layout) -> list[weightsource_pb2.GpuMemoryProbe]:
        """What engines share of their GPUs' memory, where it is not known yet whether every rank can open it.

        Asks the service every time, because engines come and go between two versions; not if it must not choose a
        transport, or if this trainer has no GPU. Engines whose GPU is too small for the version are left out. Call
        `opened` with what is found out before `begin`.
        """
        if self._kind != weightsync_pb2.TRANSPORT_KIND_UNSPECIFIED or self._device.type != "cuda":
            return []
        described = self._describe()
        attached = {probe.token for probe in described.gpu_memory}
        self._tried &= attached
        still = [token for token in self._opened.tokens if token in attached]
        self._opened = weightsource_pb2.OpenedGpuMemory(tokens=still, gpu_nbytes=self._opened.gpu_nbytes)
        nbytes = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in layout)
        by_gpu = engines_by_gpu(described.gpu_memory)
        return [
            probe
            for probe in described.gpu_memory
            if probe.token not in self._tried
            and fits_gpu_memory(nbytes, probe.gpu_nbytes, engines=by_gpu[probe.memory.device_uuid])
        ]

    def opened(
        self,
        untried: Sequence[weightsource_pb2.GpuMemoryProbe],
        reports: Sequence[weightsource_pb2.OpenedGpuMemory],
    ) -> None:
        """Take in what each rank has found out about these engines."""
        found = merge_opened(reports)
        self._tried |= {probe.token for probe in untried}
        self._opened.tokens.extend(found.tokens)
        self._opened.gpu_nbytes = found.gpu_nbytes or self._opened.gpu_nbytes

    @traced("begin version")
    def begin(
        self, version: int, train_step: int, layout: Layout, lora: policy_pb2.LoraAdapter | None = None
    ) -> PendingVersion:
        """Plan the version's buffer and allocate it; free what is left of earlier publications."""
        began = time.monotonic()
        descriptors, total_bytes = manifests.plan((name, wire_dtype(dtype), shape) for name, dtype, shape in layout)
        name = policy_pb2.WeightVersion(job_id=self._job_id, stream=self._stream, version=version)
        self.sender.trim(None)
        usable, self._usable = self._usable or usable_transports(self._describe()), None
        answer = self._stub.Allocate(
            weightsync_pb2.AllocateRequest(
                version=name,
                transport=self._kind,
                nbytes=total_bytes,
                usable=usable,
                delta_encoding=self._delta.encoding,
                full_every=self._delta.full_every,
                opened=self._opened,
            ),
            timeout=self._deadline_s,
        )
        live = list(answer.live_publication_ids)
        self.sender.trim(live)
        return PendingVersion(
            name=name,
            train_step=train_step,
            descriptors=descriptors,
            total_bytes=total_bytes,
            handles=[answer.handle, *answer.more],
            live=live,
            began_s=began,
            allocate_s=time.monotonic() - began,
            usable=usable,
            lora=lora,
        )

    @traced("announce version")
    def finish(self, pending: PendingVersion, times: SendTimes) -> PublishResult:
        """Seal and prepare a version whose descriptors carry every rank's checksums and whose handles are merged."""
        manifest = manifests.build(
            *(pending.name, pending.descriptors, pending.total_bytes, pending.train_step, pending.lora),
            checksum_kind(handle.kind for handle in pending.handles),
        )
        for handle in pending.handles:
            self.sender.transport(handle.kind).seal(handle, manifest)
        stages = {"allocate": pending.allocate_s, "copy": times.copy_s, "checksum": times.checksum_s}
        self._stub.Prepare(
            weightsync_pb2.PrepareRequest(
                manifest=manifest,
                handle=pending.handles[0],
                more=pending.handles[1:],
                written_bytes=times.written_bytes,
                stage_s=stages,
            ),
            timeout=self._deadline_s,
        )
        self._usable = pending.usable
        return PublishResult(
            manifest=manifest,
            handles=tuple(pending.handles),
            allocate_s=pending.allocate_s,
            copy_s=times.copy_s,
            checksum_s=times.checksum_s,
            total_s=time.monotonic() - pending.began_s,
            written_bytes=times.written_bytes,
        )

    def _describe(self) -> weightsync_pb2.DescribeTransportsResponse:
        request = weightsync_pb2.DescribeTransportsRequest(job_id=self._job_id, stream=self._stream)
        described: weightsync_pb2.DescribeTransportsResponse = self._stub.DescribeTransports(
            request, timeout=self._deadline_s
        )
        return described

    @contextlib.contextmanager
    def discarding_on_failure(self, pending: PendingVersion) -> Iterator[None]:
        """Undo the sends of a version if the body of the `with` fails."""
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.sender.discard, pending.handles)
            yield
            on_failure.pop_all()

    def close(self) -> None:
        """Close the transports."""
        self.sender.close()
