"""Private buffers for received versions, for transports that copy."""

from __future__ import annotations

import concurrent.futures
import contextlib
import mmap
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from miles.rpc.gen import policy_pb2
from miles.weights import manifest as manifests
from miles.weights.dtypes import TORCH_DTYPE
from miles.weights.manifest import ChecksumMismatch

HASH_BATCH_BYTES = 8 << 20
"""Small tensors are hashed together up to this size: large enough to amortise a task, small enough for the cache."""


class Buffer:
    """Zeroed memory for one version; it is freed with the last tensor that views it."""

    def __init__(self, manifest: policy_pb2.Manifest) -> None:
        """Raises OSError or MemoryError when there is not enough memory."""
        self.manifest = manifest
        self.memory = mmap.mmap(-1, manifest.total_bytes)
        with contextlib.suppress(OSError):  # without huge pages, small ones do
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = np.frombuffer(self.memory, np.uint8)
        """uint8, shape (total_bytes,)."""

    def view(self, descriptor: policy_pb2.TensorDescriptor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """A tensor's bytes."""
        return self.bytes[descriptor.offset : descriptor.offset + descriptor.nbytes]

    def verify(self, threads: concurrent.futures.Executor, source: str) -> None:
        """Raise ChecksumMismatch unless every tensor has the manifest's checksum."""

        def differing(batch: list[policy_pb2.TensorDescriptor]) -> list[str]:
            return [d.name for d in batch if manifests.checksum(self.view(d).data) != d.checksum]

        wrong = [name for names in threads.map(differing, batches(self.manifest.tensors)) for name in names]
        if wrong:
            raise ChecksumMismatch(
                f"{len(wrong)} of {len(self.manifest.tensors)} tensors of {manifests.describe(self.manifest.version)} "
                f"from {source} do not match their checksums: {', '.join(wrong[:3])}"
            )


class BufferedWeights:
    """Implements ReceivedWeights over a Buffer."""

    def __init__(self, buffer: Buffer) -> None:
        self._tensors = {d.name: tensor_over(buffer.memory, d) for d in buffer.manifest.tensors}

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """By HF name; each keeps the buffer alive."""
        return self._tensors

    def release(self) -> bool:
        """Forget the tensors. The memory is private and never rewritten, so it can be released at once."""
        self._tensors = {}
        return True


def batches(descriptors: Iterable[policy_pb2.TensorDescriptor]) -> list[list[policy_pb2.TensorDescriptor]]:
    """Consecutive tensors in lists of about HASH_BATCH_BYTES each."""
    result: list[list[policy_pb2.TensorDescriptor]] = [[]]
    size = 0
    for descriptor in descriptors:
        result[-1].append(descriptor)
        size += descriptor.nbytes
        if size >= HASH_BATCH_BYTES:
            result.append([])
            size = 0
    return result


def tensor_over(memory: mmap.mmap, descriptor: policy_pb2.TensorDescriptor) -> torch.Tensor:
    """A tensor over the descriptor's bytes of a version's memory."""
    dtype, shape = TORCH_DTYPE[descriptor.dtype], tuple(descriptor.shape)
    if descriptor.nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    count = descriptor.nbytes // dtype.itemsize
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=descriptor.offset).view(shape)
