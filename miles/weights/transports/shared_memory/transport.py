"""Weights through a file in shared memory: the trainer copies into it, engines map it and copy nothing.

Tensors on a GPU get there through pinned staging buffers: they are copied from the GPU while threads copy to the file,
and hash, those that arrived before. The weightsync service creates and removes the files; trainer and engines only map
them. Engines map privately (copy on write), so an engine that writes into a tensor harms nobody else.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import mmap
import time
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import torch

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.weights import manifest as manifests
from miles.weights.base import SendTimes
from miles.weights.bucketing import match_layout
from miles.weights.dtypes import TORCH_DTYPE
from miles.weights.manifest import ChecksumMismatch, checksum_threads
from miles.weights.staging.ring import Bytes, StagingRing, pinned_ring
from miles.weights.staging.to_host import ToHost, copy_and_hash
from miles.weights.transports.memory import HASH_BATCH_BYTES, batches, tensor_over
from miles.weights.transports.shared_memory.mapping import MappedWeights, WriteMappings, map_for_reading

_Member = tuple[policy_pb2.TensorDescriptor, Bytes | None]
"""A tensor's descriptor and the bytes to copy into the file; None when they are there already."""


class SharedMemoryTransport:
    """Implements WeightTransport over files that both sides can map."""

    def __init__(self, ring: StagingRing | None = None, staged: Collection[str] = ("cuda",)) -> None:
        """`ring`: staging buffers for tensors on devices of the types `staged`."""
        self._ring = ring or pinned_ring()
        self._staged = staged
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

        A tensor in host memory that has to be converted is converted here, at once, and hashed on those threads.
        """
        began = time.monotonic()
        memory = self._written.get(handle.shared_memory).memory
        file = np.frombuffer(memory, np.uint8)
        working: list[concurrent.futures.Future[None]] = []
        batch: list[_Member] = []
        batch_bytes = 0
        with contextlib.ExitStack() as at_end:
            at_end.callback(concurrent.futures.wait, working)  # when an export fails, the file may soon be reused
            from_device = at_end.enter_context(ToHost(self._ring, self._threads))
            for descriptor, tensor in match_layout(descriptors, tensors):
                if tensor.device.type in self._staged:
                    end = descriptor.offset + descriptor.nbytes
                    from_device.add(descriptor, tensor, file[descriptor.offset : end])
                    continue
                source = _host_bytes(tensor, TORCH_DTYPE[descriptor.dtype])
                if source is None:
                    tensor_over(memory, descriptor).copy_(tensor)
                batch.append((descriptor, source))
                batch_bytes += descriptor.nbytes
                if batch_bytes >= HASH_BATCH_BYTES:
                    working.append(self._threads.submit(_fill, memory, batch))
                    batch, batch_bytes = [], 0
            working.append(self._threads.submit(_fill, memory, batch))
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


def _host_bytes(tensor: torch.Tensor, dtype: torch.dtype) -> Bytes | None:
    """A tensor's bytes if they can be copied unchanged: of this dtype, contiguous and in host memory; else None."""
    if tensor.device.type != "cpu" or tensor.dtype != dtype or not tensor.is_contiguous():
        return None
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _fill(memory: mmap.mmap, batch: Iterable[_Member]) -> None:
    """Copy each tensor's bytes, unless they are there already, and set its checksum."""
    file = np.frombuffer(memory, np.uint8)
    for descriptor, source in batch:
        room = file[descriptor.offset : descriptor.offset + descriptor.nbytes]
        copy_and_hash(descriptor, source, room)


def _differing(memory: mmap.mmap, batch: Iterable[policy_pb2.TensorDescriptor]) -> list[str]:
    with memoryview(memory) as view:
        return [d.name for d in batch if manifests.checksum(view[d.offset : d.offset + d.nbytes]) != d.checksum]
