"""The trainer's side: put a version where the engines can get it and declare it complete."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.weights import manifest as manifests
from miles.weights.dtypes import wire_dtype
from miles.weights.transport import WeightTransport, create_transport

if TYPE_CHECKING:
    from miles.rpc.gen.weightsync_pb2_grpc import WeightSyncServiceStub

Layout = Sequence[tuple[str, torch.dtype, tuple[int, ...]]]
"""Name, dtype and shape of every tensor, in the order in which they will come."""


@dataclasses.dataclass(frozen=True, slots=True)
class PublishResult:
    """A version that is PREPARED; times in seconds."""

    manifest: policy_pb2.Manifest
    handle: weightsync_pb2.TransportHandle
    allocate_s: float
    copy_s: float
    checksum_s: float
    total_s: float

    @property
    def total_bytes(self) -> int:
        """Size of the version's buffer, in bytes."""
        return self.manifest.total_bytes


class WeightPublisher:
    """Publishes one stream of one job. Blocking: call it from a worker thread, one publication at a time."""

    def __init__(
        self,
        stub: WeightSyncServiceStub,
        job_id: str,
        stream: policy_pb2.WeightStream.ValueType = policy_pb2.WEIGHT_STREAM_POLICY,
        transport: weightsync_pb2.TransportKind.ValueType = weightsync_pb2.TRANSPORT_KIND_SHARED_MEMORY,
        deadline_s: float = 120.0,
    ) -> None:
        """`stub` is a blocking one (over grpc.Channel); `deadline_s` bounds each call to the service, in seconds."""
        self._stub = stub
        self._job_id = job_id
        self._stream = stream
        self._kind = transport
        self._transport: WeightTransport = create_transport(transport)
        self._deadline_s = deadline_s

    def publish(
        self, version: int, train_step: int, layout: Layout, tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> PublishResult:
        """Allocate, write, prepare: after this the version can be activated.

        `tensors` must follow `layout` in names, order and shapes (else ManifestError); dtypes are converted to the
        layout's. Publishing a number again replaces what was not activated and stands beside what was. grpc.RpcError
        when the service refuses or does not answer in time.
        """
        began = time.monotonic()
        descriptors, total_bytes = manifests.plan((name, wire_dtype(dtype), shape) for name, dtype, shape in layout)
        name = policy_pb2.WeightVersion(job_id=self._job_id, stream=self._stream, version=version)
        self._transport.trim()
        handle = self._stub.Allocate(
            weightsync_pb2.AllocateRequest(version=name, transport=self._kind, nbytes=total_bytes),
            timeout=self._deadline_s,
        ).handle
        allocated = time.monotonic()
        with torch.no_grad():
            times = self._transport.send(handle, descriptors, tensors)
        manifest = manifests.build(name, descriptors, total_bytes, train_step)
        self._stub.Prepare(weightsync_pb2.PrepareRequest(manifest=manifest, handle=handle), timeout=self._deadline_s)
        return PublishResult(
            manifest=manifest,
            handle=handle,
            allocate_s=allocated - began,
            copy_s=times.copy_s,
            checksum_s=times.checksum_s,
            total_s=time.monotonic() - began,
        )
