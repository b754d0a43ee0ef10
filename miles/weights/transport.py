"""How a version's bytes get from the trainer's ranks to an engine.

A version is sent in *buckets*, consecutive runs of its tensors, so that exporting one overlaps with sending another and
no rank needs the whole model:

    every rank   send(handle, descriptors of a bucket, its tensors)     once per bucket that the rank holds
    rank 0       merge the ranks' handles and checksums, build the manifest
    rank 0       seal(handle, manifest)                                 the version is complete
    each engine  receive(handle, manifest)                              after Prepare, when told to prefetch
    every rank   trim(live publications)                                at the next publication

Transports whose bytes stay with the trainer (collective, CUDA IPC) keep them from `send` on, offer them from `seal` on,
and let go of them in `trim`. What engines need to reach them goes into the handle, which `send` and `seal` complete.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from miles.cores import usable_cores
from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.weights.manifest import ManifestError

if TYPE_CHECKING:
    from miles.rpc.gen.weightsync_pb2 import TransportKind


@dataclasses.dataclass(frozen=True, slots=True)
class SendTimes:
    """Where the time of a send went, in seconds of wall time, and what it wrote."""

    copy_s: float = 0.0
    """Copying, encoding and writing, and converting where dtypes differ; checksums too where made on the way."""
    checksum_s: float = 0.0
    """Waiting for checksums after the last copy; the rest of them overlapped with copying."""
    written_bytes: int = 0
    """Bytes that left the trainer: the tensors' own, or fewer where only changes are sent."""

    def __add__(self, other: SendTimes) -> SendTimes:
        return SendTimes(
            self.copy_s + other.copy_s, self.checksum_s + other.checksum_s, self.written_bytes + other.written_bytes
        )


class ReceivedWeights(Protocol):
    """A version's tensors at hand and verified."""

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """By HF name, on CPU or on the engine's device; they may view the transport's own memory: not to be written."""

    def release(self) -> bool:
        """Let go of the bytes; False when someone still holds a tensor, so that they must not be reused."""


class WeightReceiver(Protocol):
    """An engine's end. It blocks; call it from a worker thread, one call at a time."""

    def receive(self, handle: weightsync_pb2.TransportHandle, manifest: policy_pb2.Manifest) -> ReceivedWeights:
        """Get the bytes at hand and verify them against the manifest.

        Raises ManifestError (ChecksumMismatch when bytes differ), OSError, TimeoutError or ConnectionError when they
        cannot be had.
        """

    def close(self) -> None:
        """Let go of everything. What the engine has received stays its own."""


class WeightTransport(WeightReceiver, Protocol):
    """Moves versions' bytes. Both ends block; call them from a worker thread, one call at a time."""

    def send(
        self,
        handle: weightsync_pb2.TransportHandle,
        descriptors: Sequence[policy_pb2.TensorDescriptor],
        tensors: Iterable[tuple[str, torch.Tensor]],
    ) -> SendTimes:
        """Send one bucket: tensors that come in the descriptors' order; set each descriptor's checksum if it has none.

        The descriptors are consecutive ones of the version's layout, their offsets those in the whole buffer. Buckets
        may come in any order and from any rank, each exactly once. Tensors of another dtype are converted on the way; a
        wrong name or shape raises ManifestError. OSError when there is no room.
        """

    def seal(self, handle: weightsync_pb2.TransportHandle, manifest: policy_pb2.Manifest) -> None:
        """On rank 0, after every rank has sent its buckets: complete the handle and make the version visible.

        `handle` is all ranks' handles merged (`MergeFrom`). May set `manifest.base_version`. Returns without waiting
        for an engine.
        """

    def discard(self, handle: weightsync_pb2.TransportHandle) -> None:
        """The version will not be sealed: undo what `send` did, as far as possible; raises nothing."""

    def trim(self, live: Collection[int] | None = None) -> None:
        """Let go of what is kept for publications that no engine can ask for any more: those not in `live`.

        None: nothing is known about them; only what has visibly been freed can go.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """What a transport may need to know of its process."""

    address: str = ""
    """host:port of the weightsync service."""
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    """Where the trainer's or the engine's tensors are."""
    rank: int = 0
    """The trainer's rank; 0 in an engine."""
    world_size: int = 1
    """The trainer's ranks, a count."""


def create_transport(kind: TransportKind.ValueType, endpoint: Endpoint | None = None) -> WeightTransport:
    """The transport of that kind; raises ValueError when this installation has none."""
    match kind:
        case weightsync_pb2.TRANSPORT_KIND_SHARED_MEMORY:
            from miles.weights.transports.shared_memory import SharedMemoryTransport

            return SharedMemoryTransport()
        case weightsync_pb2.TRANSPORT_KIND_DISK_DELTA:
            from miles.weights.transports.disk_delta.transport import DiskDeltaTransport

            return DiskDeltaTransport()
        case weightsync_pb2.TRANSPORT_KIND_GRPC_CHUNKS:
            from miles.weights.transports.grpc_chunks.transport import GrpcChunksTransport

            if endpoint is None or not endpoint.address:
                raise ValueError("grpc_chunks needs the address of the weightsync service; give it as Endpoint.address")
            return GrpcChunksTransport(endpoint.address)
        case weightsync_pb2.TRANSPORT_KIND_COLLECTIVE:
            from miles.weights.transports.collective.transport import CollectiveTransport

            return CollectiveTransport(endpoint or Endpoint())
        case weightsync_pb2.TRANSPORT_KIND_CUDA_IPC:
            from miles.weights.transports.cuda_ipc import CudaIpcTransport

            return CudaIpcTransport(endpoint or Endpoint())
    raise ValueError(f"this installation has no weight transport of kind {kind}; use a newer release")


def default_threads() -> int:
    """How many threads hash at once: as many as there are cores, at most 8."""
    return min(8, usable_cores())


class Sized(Protocol):
    """A tensor descriptor, or what else is as many bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""


S = TypeVar("S", bound=Sized)


def buckets(tensors: Iterable[S], bucket_bytes: int) -> Iterator[list[S]]:
    """Consecutive tensors in lists of at most `bucket_bytes` each, or of one tensor that is larger."""
    bucket: list[S] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def match(
    descriptors: Sequence[policy_pb2.TensorDescriptor], tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[policy_pb2.TensorDescriptor, torch.Tensor]]:
    """Pair each descriptor with its tensor; raise ManifestError where the export departs from its layout."""
    source = iter(tensors)
    for descriptor in descriptors:
        name, tensor = next(source, ("", None))
        if tensor is None:
            raise ManifestError(f"the export ended before tensor {descriptor.name!r} of its layout")
        if name != descriptor.name or tuple(tensor.shape) != tuple(descriptor.shape):
            raise ManifestError(
                f"the export yields {name!r} {tuple(tensor.shape)} where its layout has {descriptor.name!r} "
                f"{tuple(descriptor.shape)}"
            )
        yield descriptor, tensor.detach()
    extra, _ = next(source, ("", None))
    if extra:
        raise ManifestError(f"the export yields {extra!r} after the last tensor of its layout")
