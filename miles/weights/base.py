"""The contract of weight transports: how a version's bytes get from the trainer's ranks to an engine.

A version is sent in *buckets*, consecutive runs of its tensors, so that exporting one overlaps with sending another and
no rank needs the full model:

    every rank   send(handle, descriptors of a bucket, its tensors)     once per bucket that the rank holds
    rank 0       merge the ranks' handles and checksums, build the manifest
    rank 0       seal(handle, manifest)                                 the version is complete
    each engine  receive(handle, manifest)                              after Prepare, when ordered to prefetch
    every rank   trim(live publications)                                at the next publication

Transports whose bytes stay with the trainer (collective, CUDA IPC) hold them from `send` on, serve them from `seal` on,
and free them in `trim`. What engines need to reach them goes into the handle, which `send` and `seal` fill in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

import torch

from miles.rpc.gen import policy_pb2, weightsync_pb2


class WeightsRefused(ValueError):
    """The engine's model cannot take these weights: wrong names, shapes, types or format. No retry and no restart help.

    Whatever may pass (other bytes than announced, lost connections and servers, time, memory) is another error.
    """


@dataclasses.dataclass(frozen=True, slots=True)
class SendTimes:
    """Wall time that a send took, in seconds, by stage, and the bytes that it wrote."""

    copy_s: float = 0.0
    """Copying, encoding, writing and converting dtypes; and checksums, where they are computed while copying."""
    checksum_s: float = 0.0
    """Waiting for checksums after the last copy; the others overlapped with copying."""
    written_bytes: int = 0
    """Bytes that left the trainer: the tensors' own, or fewer where only changes are sent."""

    def __add__(self, other: SendTimes) -> SendTimes:
        return SendTimes(
            self.copy_s + other.copy_s, self.checksum_s + other.checksum_s, self.written_bytes + other.written_bytes
        )


class ReceivedWeights(Protocol):
    """A version's tensors, received and verified."""

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """By HF name, on CPU or on the engine's device. Do not write to them: they may view the transport's memory."""

    def release(self) -> bool:
        """Release the bytes; return False when someone still holds a tensor, so that they must not be reused."""


class WeightReceiver(Protocol):
    """The engine's end of a transport. It blocks; call it from a worker thread, one call at a time."""

    def receive(self, handle: weightsync_pb2.TransportHandle, manifest: policy_pb2.Manifest) -> ReceivedWeights:
        """Receive the bytes and verify them against the manifest.

        Raises ManifestError (ChecksumMismatch when bytes differ), OSError, TimeoutError or ConnectionError when that
        fails.
        """

    def close(self) -> None:
        """Release everything. Tensors that the engine has received stay valid."""


class WeightTransport(WeightReceiver, Protocol):
    """Moves the bytes of versions. Both ends block; call them from a worker thread, one call at a time."""

    def send(
        self,
        handle: weightsync_pb2.TransportHandle,
        descriptors: Sequence[policy_pb2.TensorDescriptor],
        tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        lasting: bool = False,
    ) -> SendTimes:
        """Send one bucket of tensors, which come in the descriptors' order; set each descriptor's missing checksum.

        `lasting` tensors are never written to, so that the transport may keep those in host memory without copying
        them, and knows that one at the same place in memory as in the last version has not changed.

        The descriptors are consecutive in the version's layout; their offsets count from the start of the version's
        buffer. Buckets may come in any order and from any rank, each exactly once. Tensors of another dtype are
        converted; a wrong name or shape raises ManifestError. Raises OSError when there is no room.
        """

    def seal(self, handle: weightsync_pb2.TransportHandle, manifest: policy_pb2.Manifest) -> None:
        """On rank 0, after every rank has sent its buckets: fill in the handle and make the version visible.

        `handle` is all ranks' handles merged (`MergeFrom`). May set `manifest.base_version`. Returns without waiting
        for an engine.
        """

    def discard(self, handle: weightsync_pb2.TransportHandle) -> None:
        """Undo what `send` did, as far as possible, for a version that will not be sealed. Never raises."""

    def trim(self, live: Collection[int] | None = None) -> None:
        """Free what is kept for publications that no engine can ask for any more, which are those not in `live`.

        None means that the live ones are unknown; then free only what the service has visibly freed.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """What a transport may need to know about its process."""

    address: str = ""
    """host:port of the weightsync service."""
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    """Device of the trainer's or the engine's tensors."""
    rank: int = 0
    """Rank in the trainer; 0 in an engine."""
    world_size: int = 1
    """Number of trainer ranks."""
