"""One bucket as flat bytes, and the chunks that they are cut into."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterable, Sequence

import torch

from miles.rpc.gen import policy_pb2
from miles.weights import manifest as manifests
from miles.weights.bucketing import match_layout
from miles.weights.dtypes import TORCH_DTYPE
from miles.weights.staging.ring import pinned_ring
from miles.weights.staging.to_host import ToHost
from miles.weights.transports.grpc_chunks.chunks import cut

Named = tuple[str, torch.Tensor]


class Part:
    """A bucket of a version that is sent, or of the last one, which the next one is compared with."""

    def __init__(
        self,
        descriptors: Sequence[policy_pb2.TensorDescriptor],
        tensors: Iterable[Named],
        chunk_bytes: int,
        threads: concurrent.futures.Executor,
    ) -> None:
        """Copy and cut a bucket, and set its tensors' missing checksums."""
        begin = self.begin = descriptors[0].offset
        """Offset in the version's buffer."""
        self._descriptors = descriptors
        self._tensors: Sequence[Named] = ()
        self._threads = threads
        data = self._data = _flat(descriptors, tensors, threads)
        list(threads.map(lambda d: _set_checksum(d, data[d.offset - begin :][: d.nbytes]), descriptors))
        self.chunks = cut(data, begin, chunk_bytes, threads)

    @property
    def layout(self) -> list[tuple[int, int]]:
        """Offset and length of each chunk."""
        return [(chunk.offset, chunk.nbytes) for chunk in self.chunks]

    def bytes(self, number: int) -> memoryview:
        """The bytes of a chunk."""
        chunk = self.chunks[number]
        return self._data[chunk.offset - self.begin : chunk.offset - self.begin + chunk.nbytes]

    def keep(self, tensors: Sequence[Named]) -> None:
        """Keep the bucket's tensors, which nobody writes to, instead of a copy of them, until `restore`."""
        self._tensors, self._data = tensors, memoryview(b"")

    def restore(self) -> None:
        """Have the bytes again if the tensors were kept instead."""
        if self._tensors:
            self._data = _flat(self._descriptors, self._tensors, self._threads)


def _flat(
    descriptors: Sequence[policy_pb2.TensorDescriptor], tensors: Iterable[Named], threads: concurrent.futures.Executor
) -> memoryview:
    """Copy a bucket's tensors to where their descriptors say; gaps between them are zero.

    Those on a GPU have their checksums then, too.
    """
    begin, last = descriptors[0].offset, descriptors[-1]
    flat = torch.zeros(max(1, last.offset + last.nbytes - begin), dtype=torch.uint8)
    with ToHost(pinned_ring(), threads) as from_gpu:
        for descriptor, tensor in match_layout(descriptors, tensors):
            part = flat[descriptor.offset - begin : descriptor.offset - begin + descriptor.nbytes]
            if tensor.is_cuda:
                from_gpu.add(descriptor, tensor, part.numpy())
            elif descriptor.nbytes:
                part.view(TORCH_DTYPE[descriptor.dtype]).view(tuple(descriptor.shape)).copy_(tensor)
    return memoryview(flat.numpy().data)


def _set_checksum(descriptor: policy_pb2.TensorDescriptor, data: memoryview) -> None:
    if not descriptor.checksum:
        descriptor.checksum = manifests.checksum(data)
