"""Names of transports and delta encodings in the configuration. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from miles.rpc.gen import policy_pb2, weightsync_pb2

if TYPE_CHECKING:
    from miles.rpc.gen.policy_pb2 import ChecksumKind
    from miles.rpc.gen.weightsync_pb2 import DeltaEncoding, TransportKind

TRANSPORT_OF_MODE: Mapping[str, TransportKind.ValueType] = {
    "auto": weightsync_pb2.TRANSPORT_KIND_UNSPECIFIED,
    "shared_memory": weightsync_pb2.TRANSPORT_KIND_SHARED_MEMORY,
    "disk_delta": weightsync_pb2.TRANSPORT_KIND_DISK_DELTA,
    "grpc_chunks": weightsync_pb2.TRANSPORT_KIND_GRPC_CHUNKS,
    "broadcast": weightsync_pb2.TRANSPORT_KIND_COLLECTIVE,
    "cuda_ipc": weightsync_pb2.TRANSPORT_KIND_CUDA_IPC,
}
"""By `update_weight_transfer_mode`; auto lets the weightsync service choose."""

ENCODING_OF_NAME: Mapping[str, DeltaEncoding.ValueType] = {
    "xor": weightsync_pb2.DELTA_ENCODING_XOR,
    "overwrite": weightsync_pb2.DELTA_ENCODING_OVERWRITE,
}
"""By `update_weight_delta_encoding`."""


def checksum_kind(transports: Iterable[int]) -> ChecksumKind.ValueType:
    """How the checksums of a version are computed that is sent by these transports: where its bytes are."""
    if set(transports) == {weightsync_pb2.TRANSPORT_KIND_CUDA_IPC}:
        return policy_pb2.CHECKSUM_KIND_BLOCK_SUMS
    return policy_pb2.CHECKSUM_KIND_UNSPECIFIED
