"""Weights through a file in shared memory: the trainer copies into it, engines map it and copy nothing.

The weightsync service creates and removes the files; trainer and engines only map them. Engines map privately (copy on
write), so an engine that writes into a tensor harms nobody else.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import mmap
import time
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.weights import manifest as manifests
from miles.weights.base import SendTimes
from miles.weights.bucketing import match_layout
from miles.weights.dtypes import TORCH_DTYPE
from miles.weights.manifest import ChecksumMismatch, checksum_threads
from miles.weights.transports.memory import HASH_BATCH_BYTES, batches, tensor_over
from miles.weights.transports.shared_memory.mapping import MappedWeights, WriteMappings, map_for_reading

_PIECE_BYTES = 1 << 20
"""Copied at a time before it is hashed, so that it is still in the core's own cache."""

_Bytes = npt.NDArray[np.uint8]
_Member = tuple[policy_pb2.TensorDescriptor, _Bytes | None]
"""A tensor's descriptor and the bytes to copy into the file; None when they are there already."""


class SharedMemoryTransport:
    """Implements WeightTransport over files that both sides can map."""

    def __init__(self) -> None:
        self._threads = concurrent.futures.ThreadPoolExecutor(checksum_threads(), thread_name_prefix="weight-checksum")
        self._written = WriteMappings()

    def send(
        self,
        handle: weightsync_pb2.TransportHandle,
        descriptors: Sequence[policy_pb2.TensorDescriptor],
        tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        lasting: bool = False,
    ) -> SendTimes:
        """Copy tensors into the file on several threads and hash each piece while it is still in cache.

        A tensor that has to be converted or copied from a device is copied here, at once, and hashed on those threads.
        """
        began = time.monotonic()
        mapping = self._written.get(handle.shared_memory)
        working: list[concurrent.futures.Future[None]] = []
        batch: list[_Member] = []
        batch_bytes = 0
        with contextlib.ExitStack() as at_end:
            at_end.callback(concurrent.futures.wait, working)  # when an export fails, the file may soon be reused
            for descriptor, tensor in match_layout(descriptors, tensors):
                source = _host_bytes(tensor, TORCH_DTYPE[descriptor.dtype])
                if source is None:
                    tensor_over(mapping.memory, descriptor).copy_(tensor)
                batch.append((descriptor, source))
                batch_bytes += descriptor.nbytes
                if batch_bytes >= HASH_BATCH_BYTES:
                    working.append(self._threads.submit(_fill, mapping.memory, batch))
                    batch, batch_bytes = [], 0
            working.append(self._threads.submit(_fill, mapping.memory, batch))
        for future in working:
            future.result()
        written = sum(descriptor.nbytes for descriptor in descriptors)
        return SendTimes(copy_s=time.monotonic() - began, written_bytes=written)

    def seal(self, handle: weightsync_pb2.TransportHandle, manifest: policy_pb2.Manifest) -> None:
        """Nothing to do: engines map the file that `send` wrote."""

    def discard(self, handle: weightsync_pb2.TransportHandle) -> None:
        """Nothing to do: the service removes the file."""

    def receive(self, handle: weightsync_pb2.TransportHandle, manifest: policy_pb2.Manifest) -> MappedWeights:
        """Map the file and verify every tensor."""
        manifests.validate(manifest)
        memory = map_for_reading(handle.shared_memory, manifest)
        parts = batches(manifest.tensors)
        differing = [name for names in self._threads.map(lambda b: _differing(memory, b), parts) for name in names]
        if differing:
            raise ChecksumMismatch(
                f"{len(differing)} of {len(manifest.tensors)} tensors of {manifests.describe(manifest.version)} in "
                f"{handle.shared_memory.path} do not match their checksums: {', '.join(differing[:3])}"
            )
        return MappedWeights(memory, manifest.tensors)

    def trim(self, live: Collection[int] | None = None) -> None:
        """Unmap files that have been removed since they were written."""
        self._written.trim()

    def close(self) -> None:
        """Unmap every file written."""
        self._written.close()
        self._threads.shutdown()


def _host_bytes(tensor: torch.Tensor, dtype: torch.dtype) -> _Bytes | None:
    """A tensor's bytes if they can be copied unchanged: of this dtype, contiguous and in host memory; else None."""
    if tensor.device.type != "cpu" or tensor.dtype != dtype or not tensor.is_contiguous():
        return None
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _fill(memory: mmap.mmap, batch: Iterable[_Member]) -> None:
    """Copy each tensor's bytes, unless they are there already, and set its checksum."""
    target = np.frombuffer(memory, np.uint8)
    for descriptor, source in batch:
        room = target[descriptor.offset : descriptor.offset + descriptor.nbytes]
        checksum = manifests.Checksum()
        for begin in range(0, descriptor.nbytes, _PIECE_BYTES):
            piece = room[begin : begin + _PIECE_BYTES]
            if source is not None:
                np.copyto(piece, source[begin : begin + _PIECE_BYTES])
            checksum.update(piece.data)
        if not descriptor.checksum:
            descriptor.checksum = checksum.digest()


def _differing(memory: mmap.mmap, batch: Iterable[policy_pb2.TensorDescriptor]) -> list[str]:
    with memoryview(memory) as view:
        return [d.name for d in batch if manifests.checksum(view[d.offset : d.offset + d.nbytes]) != d.checksum]
