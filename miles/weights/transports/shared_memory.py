"""Weights through a file in shared memory: the trainer copies straight into it, engines map it and copy nothing.

The weightsync service creates and removes the files; this module only maps them. Engines map privately (copy on write),
so an engine that writes into a tensor harms nobody else.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import mmap
import os
import time
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.weights import manifest as manifests
from miles.weights.dtypes import TORCH_DTYPE
from miles.weights.manifest import ChecksumMismatch, ManifestError
from miles.weights.transport import SendTimes, default_threads, match
from miles.weights.transports.memory import HASH_BATCH_BYTES, batches, tensor_over

_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23
"""Linux ≥ 5.14; not named by the mmap module."""

_PIECE_BYTES = 1 << 20
"""Copied at a time before it is hashed: what a core's own cache holds."""

_Bytes = npt.NDArray[np.uint8]
_Member = tuple[policy_pb2.TensorDescriptor, _Bytes | None]
"""A tensor's place in the file and the bytes to put there; None where they are there already."""


class SharedMemoryTransport:
    """Implements WeightTransport over files that both sides can map."""

    def __init__(self, checksum_threads: int | None = None) -> None:
        """`checksum_threads`: how many hash at once; default: as many as there are CPUs, at most 8."""
        threads = checksum_threads or default_threads()
        self._threads = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="weight-checksum")
        self._written: dict[tuple[int, int, int], _WriteMapping] = {}

    def send(
        self,
        handle: weightsync_pb2.TransportHandle,
        descriptors: Sequence[policy_pb2.TensorDescriptor],
        tensors: Iterable[tuple[str, torch.Tensor]],
    ) -> SendTimes:
        """Copy tensors into the file on several threads, each piece hashed while it is still in cache.

        A tensor that has to be converted or brought from a device is copied whole, here, and hashed on those threads.
        """
        began = time.monotonic()
        mapping = self._map_for_writing(handle.shared_memory)
        working: list[concurrent.futures.Future[None]] = []
        batch: list[_Member] = []
        batch_bytes = 0
        try:
            for descriptor, tensor in match(descriptors, tensors):
                source = _host_bytes(tensor, TORCH_DTYPE[descriptor.dtype])
                if source is None:
                    tensor_over(mapping.memory, descriptor).copy_(tensor)
                batch.append((descriptor, source))
                batch_bytes += descriptor.nbytes
                if batch_bytes >= HASH_BATCH_BYTES:
                    working.append(self._threads.submit(_fill, mapping.memory, batch))
                    batch, batch_bytes = [], 0
            working.append(self._threads.submit(_fill, mapping.memory, batch))
        finally:
            concurrent.futures.wait(working)  # after an export that broke off, the file may soon be another version's
        for future in working:
            future.result()
        written = sum(descriptor.nbytes for descriptor in descriptors)
        return SendTimes(copy_s=time.monotonic() - began, written_bytes=written)

    def seal(self, handle: weightsync_pb2.TransportHandle, manifest: policy_pb2.Manifest) -> None:
        """Nothing to do: the bytes are where engines map them."""

    def discard(self, handle: weightsync_pb2.TransportHandle) -> None:
        """Nothing to do: the service removes the file."""

    def receive(self, handle: weightsync_pb2.TransportHandle, manifest: policy_pb2.Manifest) -> MappedWeights:
        """Map the file and verify every tensor."""
        manifests.validate(manifest)
        memory = _map_for_reading(handle.shared_memory, manifest)
        parts = batches(manifest.tensors)
        differing = [name for names in self._threads.map(lambda b: _differing(memory, b), parts) for name in names]
        if differing:
            raise ChecksumMismatch(
                f"{len(differing)} of {len(manifest.tensors)} tensors of {manifests.describe(manifest.version)} in "
                f"{handle.shared_memory.path} do not match their checksums: {', '.join(differing[:3])}"
            )
        return MappedWeights(memory, manifest.tensors)

    def trim(self, live: Collection[int] | None = None) -> None:
        """Unmap files that have been removed since they were written; one that was kept may serve again."""
        for key, mapping in list(self._written.items()):
            if os.fstat(mapping.fd).st_nlink == 0:
                del self._written[key]
                mapping.close()

    def close(self) -> None:
        """Unmap every file written."""
        for mapping in self._written.values():
            mapping.close()
        self._written.clear()
        self._threads.shutdown()

    def _map_for_writing(self, handle: weightsync_pb2.SharedMemoryHandle) -> _WriteMapping:
        """Map a file, or find the mapping made when the same file, under its former name, held an older version.

        A kept mapping saves a page fault per page, which would cost about as much as the copy.
        """
        fd = os.open(handle.path, os.O_RDWR | os.O_CLOEXEC)
        stat = os.fstat(fd)
        if stat.st_size < handle.nbytes:
            os.close(fd)
            raise OSError(f"{handle.path} has {stat.st_size} bytes; {handle.nbytes} were allocated")
        key = (stat.st_dev, stat.st_ino, stat.st_size)
        if key in self._written:
            os.close(fd)
        else:
            memory = mmap.mmap(fd, stat.st_size)
            _populate(memory, _MADV_POPULATE_WRITE)
            self._written[key] = _WriteMapping(fd, memory)
        return self._written[key]


class MappedWeights:
    """Tensors that view a private mapping of a version's file."""

    def __init__(self, memory: mmap.mmap, descriptors: Iterable[policy_pb2.TensorDescriptor]) -> None:
        self._tensors = {d.name: tensor_over(memory, d) for d in descriptors}
        self._memory = weakref.ref(memory)

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """By HF name; each keeps the mapping alive."""
        return self._tensors

    def release(self) -> bool:
        """Forget the tensors; the mapping goes with the last of them. False while someone else holds one."""
        self._tensors = {}
        return self._memory() is None


class _WriteMapping:
    """A file mapped for writing; its descriptor stays open to see whether the file still has a name."""

    def __init__(self, fd: int, memory: mmap.mmap) -> None:
        self.fd = fd
        self.memory = memory
        self._close_fd = weakref.finalize(self, os.close, fd)

    def close(self) -> None:
        self._close_fd()
        self.memory.close()


def _map_for_reading(handle: weightsync_pb2.SharedMemoryHandle, manifest: policy_pb2.Manifest) -> mmap.mmap:
    fd = os.open(handle.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        if size < manifest.total_bytes:
            raise ManifestError(f"{handle.path} has {size} bytes; the manifest needs {manifest.total_bytes}")
        # Writable, because torch wants no read-only buffers; private, so writes would stay here.
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        memory = mmap.mmap(fd, manifest.total_bytes, flags=mmap.MAP_PRIVATE, prot=protection)
    finally:
        os.close(fd)
    _populate(memory, _MADV_POPULATE_READ)
    return memory


def _populate(memory: mmap.mmap, advice: int) -> None:
    """Fault in every page at once, which costs a fraction of one fault per page."""
    with contextlib.suppress(OSError):  # an older kernel faults page by page instead
        memory.madvise(advice)


def _host_bytes(tensor: torch.Tensor, dtype: torch.dtype) -> _Bytes | None:
    """A tensor's bytes where they can be copied as they are: of this type, contiguous, in host memory."""
    if tensor.device.type != "cpu" or tensor.dtype != dtype or not tensor.is_contiguous():
        return None
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _fill(memory: mmap.mmap, batch: Iterable[_Member]) -> None:
    """Copy what is not there yet and set each tensor's checksum."""
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
