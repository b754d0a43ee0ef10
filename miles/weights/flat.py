"""Versions, or ranges of them, as flat bytes in a tensor: views by descriptor, checksums, and when they are free."""

from __future__ import annotations

import bisect
import concurrent.futures
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from miles.rpc.gen import policy_pb2
from miles.weights import manifest as manifests
from miles.weights.block_sums import block_checksums
from miles.weights.bucketing import buckets
from miles.weights.dtypes import TORCH_DTYPE
from miles.weights.manifest import ChecksumMismatch, ManifestError

_STAGING_BYTES = 64 << 20
"""Tensors are hashed in batches of about this size; those in device memory are copied to the host batch by batch."""

Descriptors = Sequence[policy_pb2.TensorDescriptor]


def extent(descriptors: Descriptors) -> tuple[int, int]:
    """Offset and length, in bytes, of the range of the buffer that consecutive tensors occupy."""
    begin = descriptors[0].offset
    return begin, descriptors[-1].offset + descriptors[-1].nbytes - begin


def views(flat: torch.Tensor, descriptors: Descriptors, base: int = 0) -> list[torch.Tensor]:
    """Tensors over their bytes of `flat`, uint8 (n,), whose first byte is the version's byte `base`.

    One call of torch a tensor, because a version has hundreds of them and they are made twice. ManifestError for a
    tensor that is not all in `flat`.
    """
    made: list[torch.Tensor] = []
    typed: dict[int, tuple[torch.Tensor, int, int]] = {}
    end = flat.numel()
    for descriptor in descriptors:
        nbytes, dtype = descriptor.nbytes, descriptor.dtype
        begin = descriptor.offset - base if nbytes else 0
        if not 0 <= begin <= begin + nbytes <= end:
            raise ManifestError(f"tensor {descriptor.name!r} is not in the {end} bytes from byte {base} on")
        if dtype not in typed:
            size = TORCH_DTYPE[dtype].itemsize
            elements = flat[: end - end % size].view(TORCH_DTYPE[dtype])
            typed[dtype] = elements, size, int(elements.storage_offset())
        elements, size, start = typed[dtype]
        shape = tuple(descriptor.shape)
        made.append(elements.as_strided(shape, _strides(shape), start + begin // size))
    return made


@functools.lru_cache(maxsize=4096)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def clear_gaps(flat: torch.Tensor, descriptors: Descriptors) -> None:
    """Zero the gaps that align tensors, so that no stale memory is sent."""
    base, end = descriptors[0].offset, descriptors[0].offset
    for descriptor in descriptors:
        if descriptor.offset != end:
            flat[end - base : descriptor.offset - base].zero_()
        end = descriptor.offset + descriptor.nbytes


def packed(flat: torch.Tensor, descriptors: Descriptors) -> torch.Tensor:
    """The same bytes without the gaps that align tensors; `flat` itself when it has none."""
    base = descriptors[0].offset
    parts = [flat[d.offset - base : d.offset - base + d.nbytes] for d in descriptors]
    return flat if sum(d.nbytes for d in descriptors) == flat.numel() else torch.cat(parts)


def set_checksums(
    flat: torch.Tensor,
    descriptors: Descriptors,
    base: int,
    threads: concurrent.futures.Executor,
    kind: int = policy_pb2.CHECKSUM_KIND_UNSPECIFIED,
) -> None:
    """Set the checksum of each descriptor that has none."""
    for descriptor, value in _checksums(flat, descriptors, base, threads, kind):
        if not descriptor.checksum:
            descriptor.checksum = value


def verify(
    flats: Mapping[int, torch.Tensor],
    manifest: policy_pb2.Manifest,
    source: str,
    threads: concurrent.futures.Executor,
) -> None:
    """Raise ChecksumMismatch unless the ranges, by offset, hold the version's bytes; `source` is for the message."""
    differing = [
        descriptor.name
        for base, descriptors in by_range(flats, manifest.tensors)
        for descriptor, value in _checksums(flats[base], descriptors, base, threads, manifest.checksum_kind)
        if value != descriptor.checksum
    ]
    if differing:
        raise ChecksumMismatch(
            f"{len(differing)} of {len(manifest.tensors)} tensors of {manifests.describe(manifest.version)} from "
            f"{source} do not match their checksums: {', '.join(differing[:3])}"
        )


def check_covered(manifest: policy_pb2.Manifest, ranges: Iterable[tuple[int, int]]) -> None:
    """Raise ManifestError unless ranges (offset, length) lie in the buffer and hold every tensor exactly once."""
    covered: list[tuple[int, int]] = sorted(ranges)
    if not covered:
        raise ManifestError(f"the handle of {manifests.describe(manifest.version)} names no buckets")
    position = 0
    for begin, length in covered:
        if begin < position or begin + length > manifest.total_bytes:
            raise ManifestError(f"a bucket at byte {begin} of {length} bytes overlaps another or leaves the buffer")
        position = begin + length
    lengths = dict(covered)
    for base, tensors in by_range(lengths, manifest.tensors):
        for tensor in tensors:
            if tensor.nbytes and not base <= tensor.offset <= tensor.offset + tensor.nbytes <= base + lengths[base]:
                raise ManifestError(f"no bucket holds all of tensor {tensor.name!r}")


class FlatWeights:
    """A version's tensors as views of one flat tensor; implements ReceivedWeights."""

    def __init__(self, flats: Mapping[int, torch.Tensor], descriptors: Descriptors) -> None:
        """`flats` are uint8 (n,) by the offset of their first byte, ascending; each holds complete tensors."""
        self._storages = [_storage_ref(flat) for flat in flats.values()]
        self._tensors = {
            descriptor.name: tensor
            for base, members in by_range(flats, descriptors)
            for descriptor, tensor in zip(members, views(flats[base], members, base), strict=True)
        }

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """By HF name; each keeps its bucket alive."""
        return self._tensors

    def release(self) -> bool:
        """Forget the tensors; the memory is freed with the last of them. False while someone else holds one."""
        self._tensors = {}
        return all(bool(storage.expired()) for storage in self._storages)


def _checksums(
    flat: torch.Tensor, descriptors: Descriptors, base: int, threads: concurrent.futures.Executor, kind: int
) -> Iterator[tuple[policy_pb2.TensorDescriptor, bytes]]:
    """Each descriptor with the checksum of its bytes; for block sums, the gaps between them must be zero."""
    if kind == policy_pb2.CHECKSUM_KIND_BLOCK_SUMS:
        yield from zip(descriptors, block_checksums(flat, descriptors, base), strict=True)
        return
    for batch in buckets(descriptors, _STAGING_BYTES):
        begin, length = extent(batch)
        data = _on_host(flat[begin - base : begin - base + length])
        pieces = [data[d.offset - begin : d.offset - begin + d.nbytes] for d in batch]
        yield from zip(batch, threads.map(manifests.checksum, pieces), strict=True)


def _on_host(flat: torch.Tensor) -> memoryview:
    """The bytes in host memory; device memory is copied through pinned memory, which is several times as fast."""
    if flat.device.type == "cpu":
        return flat.numpy().data
    return torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True).copy_(flat).numpy().data


def by_range(starts: Mapping[int, object], descriptors: Descriptors) -> Iterator[tuple[int, Descriptors]]:
    """The descriptors, whose offsets ascend, that begin in each range, by the range's start."""
    offsets = [descriptor.offset for descriptor in descriptors]
    ordered = sorted(starts)
    cuts = [0, *(bisect.bisect_left(offsets, start) for start in ordered[1:]), len(descriptors)]
    for start, first, last in zip(ordered, cuts, cuts[1:], strict=False):
        yield start, descriptors[first:last]


def _storage_ref(flat: torch.Tensor) -> Any:
    """A reference that shows whether the memory has been freed, which one to a tensor would not."""
    return StorageWeakRef(flat.untyped_storage())  # type: ignore[no-untyped-call]
