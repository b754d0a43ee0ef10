"""Memory mappings of versions' files: for the trainer to write, and for engines to read."""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from collections.abc import Iterable, Mapping

import torch

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.weights.manifest import ManifestError
from miles.weights.transports.memory import tensor_over

_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23
"""Linux ≥ 5.14; not named by the mmap module."""


class WriteMapping:
    """A file mapped for writing. Its descriptor stays open to see whether the file still has a name."""

    def __init__(self, fd: int, memory: mmap.mmap) -> None:
        self.fd = fd
        self.memory = memory
        self._close_fd = weakref.finalize(self, os.close, fd)

    def close(self) -> None:
        """Unmap the file."""
        self._close_fd()
        with contextlib.suppress(BufferError):  # the error of a failed export may refer to arrays over the file still
            self.memory.close()


class WriteMappings:
    """The files that a trainer has mapped for writing."""

    def __init__(self) -> None:
        self._mappings: dict[tuple[int, int, int], WriteMapping] = {}

    def get(self, handle: weightsync_pb2.SharedMemoryHandle) -> WriteMapping:
        """Map a file, or return the mapping made when the same file, under its former name, held an older version.

        A kept mapping saves a page fault per page, which would cost about as much as the copy.
        """
        fd = os.open(handle.path, os.O_RDWR | os.O_CLOEXEC)
        stat = os.fstat(fd)
        if stat.st_size < handle.nbytes:
            os.close(fd)
            raise OSError(f"{handle.path} has {stat.st_size} bytes; {handle.nbytes} were allocated")
        key = (stat.st_dev, stat.st_ino, stat.st_size)
        if key in self._mappings:
            os.close(fd)
        else:
            memory = mmap.mmap(fd, stat.st_size)
            _populate(memory, _MADV_POPULATE_WRITE)
            self._mappings[key] = WriteMapping(fd, memory)
        return self._mappings[key]

    def trim(self) -> None:
        """Unmap files that have been removed since they were written; one that was kept may be used again."""
        for key, mapping in list(self._mappings.items()):
            if os.fstat(mapping.fd).st_nlink == 0:
                del self._mappings[key]
                mapping.close()

    def close(self) -> None:
        """Unmap every file."""
        for mapping in self._mappings.values():
            mapping.close()
        self._mappings.clear()


class MappedWeights:
    """Tensors that view a private mapping of a version's file; implements ReceivedWeights."""

    def __init__(self, memory: mmap.mmap, descriptors: Iterable[policy_pb2.TensorDescriptor]) -> None:
        self._tensors = {d.name: tensor_over(memory, d) for d in descriptors}
        self._memory = weakref.ref(memory)

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """By HF name; each keeps the mapping alive."""
        return self._tensors

    def release(self) -> bool:
        """Forget the tensors; the mapping is freed with the last of them. False while someone else holds one."""
        self._tensors = {}
        return self._memory() is None


def map_for_reading(handle: weightsync_pb2.SharedMemoryHandle, manifest: policy_pb2.Manifest) -> mmap.mmap:
    """Map a file privately; ManifestError when it is too small for the manifest."""
    with open(handle.path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size < manifest.total_bytes:
            raise ManifestError(f"{handle.path} has {size} bytes; the manifest needs {manifest.total_bytes}")
        # Writable, because torch wants no read-only buffers; private, so writes would stay here.
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        memory = mmap.mmap(file.fileno(), manifest.total_bytes, flags=mmap.MAP_PRIVATE, prot=protection)
    _populate(memory, _MADV_POPULATE_READ)
    return memory


def _populate(memory: mmap.mmap, advice: int) -> None:
    """Fault in every page at once, which costs a fraction of one fault per page."""
    with contextlib.suppress(OSError):  # an older kernel faults page by page instead
        memory.madvise(advice)
