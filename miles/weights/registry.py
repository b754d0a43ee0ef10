"""The weight transports of this installation, by kind.

To add one: write its folder in `transports/` and add it to `_TRANSPORTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from miles.rpc.gen import weightsync_pb2
from miles.weights.base import Endpoint, WeightTransport
from miles.weights.transports.collective.transport import CollectiveTransport
from miles.weights.transports.cuda_ipc.transport import CudaIpcTransport
from miles.weights.transports.disk_delta.transport import DiskDeltaTransport
from miles.weights.transports.grpc_chunks.transport import GrpcChunksTransport
from miles.weights.transports.shared_memory.transport import SharedMemoryTransport

if TYPE_CHECKING:
    from miles.rpc.gen.weightsync_pb2 import TransportKind

_TRANSPORTS: Mapping[TransportKind.ValueType, Callable[[Endpoint], WeightTransport]] = {
    weightsync_pb2.TRANSPORT_KIND_SHARED_MEMORY: lambda _: SharedMemoryTransport(),
    weightsync_pb2.TRANSPORT_KIND_DISK_DELTA: lambda _: DiskDeltaTransport(),
    weightsync_pb2.TRANSPORT_KIND_GRPC_CHUNKS: lambda endpoint: GrpcChunksTransport(endpoint.address),
    weightsync_pb2.TRANSPORT_KIND_COLLECTIVE: CollectiveTransport,
    weightsync_pb2.TRANSPORT_KIND_CUDA_IPC: CudaIpcTransport,
}


def create_transport(kind: TransportKind.ValueType, endpoint: Endpoint | None = None) -> WeightTransport:
    """Create the transport of a kind; raise ValueError when this installation has none."""
    if kind not in _TRANSPORTS:
        raise ValueError(f"this installation has no weight transport of kind {kind}; use a newer release")
    return _TRANSPORTS[kind](endpoint or Endpoint())
