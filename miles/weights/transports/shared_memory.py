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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.weights import manifest as manifests
from miles.weights.manifest import ChecksumMismatch, ManifestError
from miles.weights.transport import SendTimes, default_threads, match
from miles.weights.transports.memory import HASH_BATCH_BYTES, batches, tensor_over

_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23
"""Linux ≥ 5.14; not named by the mmap module."""


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
        """Copy tensors into the file; checksums are computed on other threads while the bytes are still in cache."""
        began = time.monotonic()
        mapping = self._map_for_writing(handle.shared_memory)
        hashing: list[concurrent.futures.Future[None]] = []
        batch: list[policy_pb2.TensorDescriptor] = []
        batch_bytes = 0
        for descriptor, tensor in match(descriptors, tensors):
            if descriptor.nbytes:
                tensor_over(mapping.memory, descriptor).copy_(tensor)
            batch.append(descriptor)
            batch_bytes += descriptor.nbytes
            if batch_bytes >= HASH_BATCH_BYTES:
                hashing.append(self._threads.submit(_set_checksums, mapping.memory, batch))
                batch, batch_bytes = [], 0
        hashing.append(self._threads.submit(_set_checksums, mapping.memory, batch))
        copied = time.monotonic()
        for future in hashing:
            future.result()
        written = sum(descriptor.nbytes for descriptor in descriptors)
        return SendTimes(copied - began, time.monotonic() - copied, written)

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


def _set_checksums(memory: mmap.mmap, batch: Iterable[policy_pb2.TensorDescriptor]) -> None:
    def store(descriptor: policy_pb2.TensorDescriptor, value: bytes) -> None:
        if not descriptor.checksum:
            descriptor.checksum = value

    _each_checksum(memory, batch, store)


def _differing(memory: mmap.mmap, batch: Iterable[policy_pb2.TensorDescriptor]) -> list[str]:
    names: list[str] = []

    def compare(descriptor: policy_pb2.TensorDescriptor, value: bytes) -> None:
        if value != descriptor.checksum:
            names.append(descriptor.name)

    _each_checksum(memory, batch, compare)
    return names


def _each_checksum(
    memory: mmap.mmap,
    batch: Iterable[policy_pb2.TensorDescriptor],
    visit: Callable[[policy_pb2.TensorDescriptor, bytes], None],
) -> None:
    with memoryview(memory) as view:
        for descriptor in batch:
            with view[descriptor.offset : descriptor.offset + descriptor.nbytes] as data:
                visit(descriptor, manifests.checksum(data))
