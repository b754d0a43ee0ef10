"""How a version's bytes get from the trainer to an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch

from miles.rpc.gen import policy_pb2, weightsync_pb2


@dataclasses.dataclass(frozen=True, slots=True)
class SendTimes:
    """Where the time of a send went, in seconds of wall time."""

    copy_s: float
    """Copying, and converting where dtypes differ."""
    checksum_s: float
    """Waiting for checksums after the last copy; the rest of them overlapped with copying."""


class ReceivedWeights(Protocol):
    """A version's tensors at hand and verified."""

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """By HF name, on CPU; they may view the transport's own memory and must not be written to."""

    def release(self) -> bool:
        """Let go of the bytes; False when someone still holds a tensor, so that they must not be reused."""


class WeightTransport(Protocol):
    """Moves a version's bytes. Both ends block; call them from a worker thread."""

    def send(
        self,
        handle: weightsync_pb2.TransportHandle,
        descriptors: Sequence[policy_pb2.TensorDescriptor],
        tensors: Iterable[tuple[str, torch.Tensor]],
    ) -> SendTimes:
        """Write tensors, which come in the descriptors' order, and set each descriptor's checksum.

        Tensors of another dtype are converted on the way; a wrong name or shape raises ManifestError.
        """

    def receive(self, handle: weightsync_pb2.TransportHandle, manifest: policy_pb2.Manifest) -> ReceivedWeights:
        """Get the bytes at hand and verify them against the manifest.

        Raises ManifestError (ChecksumMismatch when bytes differ) or OSError when they cannot be had.
        """

    def trim(self) -> None:
        """Let go of memory kept for reuse that the weightsync service has freed meanwhile."""


def create_transport(kind: weightsync_pb2.TransportKind.ValueType) -> WeightTransport:
    """The transport of that kind; raises ValueError when this installation has none."""
    if kind == weightsync_pb2.TRANSPORT_KIND_SHARED_MEMORY:
        from miles.weights.transports.shared_memory import SharedMemoryTransport

        return SharedMemoryTransport()
    raise ValueError(f"no weight transport for {weightsync_pb2.TransportKind.Name(kind)}; available: SHARED_MEMORY")
