"""Manifests: the layout and checksums of a version of the weights, and the checks that a receiver makes.

Buffers are treated as flat little-endian bytes; nothing here needs torch.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import xxhash

from miles.cores import usable_cores
from miles.rpc.gen import policy_pb2, sample_pb2

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from miles.rpc.gen.policy_pb2 import ChecksumKind
    from miles.rpc.gen.sample_pb2 import DType

ALIGNMENT = 64
"""Every tensor starts at a multiple of this many bytes: a cache line, and enough for any vector load."""

CHECKSUM_BYTES = 16

DTYPE_BYTES: dict[int, int] = {
    sample_pb2.DTYPE_UINT8: 1,
    sample_pb2.DTYPE_UINT16: 2,
    sample_pb2.DTYPE_INT32: 4,
    sample_pb2.DTYPE_INT64: 8,
    sample_pb2.DTYPE_FLOAT32: 4,
    sample_pb2.DTYPE_FLOAT16: 2,
    sample_pb2.DTYPE_BFLOAT16: 2,
    sample_pb2.DTYPE_FLOAT8_E4M3: 1,
    sample_pb2.DTYPE_FLOAT64: 8,
    sample_pb2.DTYPE_INT8: 1,
    sample_pb2.DTYPE_BOOL: 1,
}
"""Size of one element, in bytes."""


class ManifestError(ValueError):
    """A manifest contradicts itself, or the bytes it describes."""


class ChecksumMismatch(ManifestError):
    """Bytes do not have the checksum of the manifest."""


def checksum(data: Buffer) -> bytes:
    """xxh3-128 of a buffer, 16 bytes big-endian."""
    return bytes(xxhash.xxh3_128_digest(data))


Checksum = xxhash.xxh3_128
"""The same for bytes that come in pieces: `update` with each, then `digest`."""


def checksum_threads() -> int:
    """How many threads hash and copy at once: one per usable core, at most 8."""
    return min(8, usable_cores())


def aligned(offset: int) -> int:
    """The first offset from this one on at which a tensor may begin, in bytes."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def offsets(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Where tensors of these sizes begin one after the other, and where the last one ends, in bytes."""
    begins, end = [], 0
    for size in sizes:
        begins.append(aligned(end))
        end = begins[-1] + size
    return begins, end


def plan(layout: Iterable[tuple[str, DType.ValueType, Sequence[int]]]) -> tuple[list[policy_pb2.TensorDescriptor], int]:
    """Place tensors one after the other at aligned offsets; return their descriptors, without checksums, and the size.

    The size, in bytes, is at least 1, so that every version has a buffer. Raises ManifestError for a repeated name.
    """
    entries = tuple((name, dtype, tuple(shape)) for name, dtype, shape in layout)
    planned = policy_pb2.Manifest.FromString(_planned(entries))
    return list(planned.tensors), planned.total_bytes


@functools.lru_cache(maxsize=4)
def _planned(layout: tuple[tuple[str, DType.ValueType, tuple[int, ...]], ...]) -> bytes:
    """A serialised manifest with the descriptors: every version of a model has the same, and parsing is fast."""
    descriptors: list[policy_pb2.TensorDescriptor] = []
    names: set[str] = set()
    end = 0
    for name, dtype, shape in layout:
        if name in names:
            raise ManifestError(f"tensor {name!r} occurs twice in the layout; names must be unique")
        names.add(name)
        offset = aligned(end)
        nbytes = math.prod(shape) * _dtype_bytes(name, dtype)
        descriptors.append(
            policy_pb2.TensorDescriptor(name=name, dtype=dtype, shape=shape, offset=offset, nbytes=nbytes)
        )
        end = offset + nbytes
    return policy_pb2.Manifest(tensors=descriptors, total_bytes=max(end, 1)).SerializeToString()


def build(
    version: policy_pb2.WeightVersion,
    descriptors: Iterable[policy_pb2.TensorDescriptor],
    total_bytes: int,
    train_step: int,
    lora: policy_pb2.LoraAdapter | None = None,
    checksum_kind: ChecksumKind.ValueType = policy_pb2.CHECKSUM_KIND_UNSPECIFIED,
) -> policy_pb2.Manifest:
    """Build a manifest of descriptors that have their checksums; `lora` is set when they are an adapter's tensors."""
    manifest = policy_pb2.Manifest(
        version=version,
        total_bytes=total_bytes,
        train_step=train_step,
        created_unix_ns=time.time_ns(),
        lora=lora,
        checksum_kind=checksum_kind,
    )
    manifest.tensors.extend(descriptors)
    manifest.checksum = manifest_checksum(manifest)
    return manifest


def manifest_checksum(manifest: policy_pb2.Manifest) -> bytes:
    """xxh3-128 over every tensor in order, each as (little-endian, lengths first)

    u32 len(name), name in UTF-8, u32 dtype, u32 len(shape), u64 per dimension, u64 offset, the 16 checksum bytes.

    For an adapter, it begins with u32 rank, f64 alpha and the base's 16 checksum bytes, because the same tensors on
    another base are different weights. Before all that comes the kind of checksum as u32, when it is not xxh3-128.
    """
    return _checksum_over(_layout_of(manifest), manifest)


def _checksum_over(layout: bytes, manifest: policy_pb2.Manifest) -> bytes:
    """`manifest_checksum` of a manifest with this layout."""
    digest = Checksum()
    if manifest.checksum_kind:
        digest.update(struct.pack("<I", manifest.checksum_kind))
    if manifest.HasField("lora"):
        digest.update(struct.pack("<Id", manifest.lora.rank, manifest.lora.alpha) + manifest.lora.base_checksum)
    checksums = (tensor.checksum for tensor in manifest.tensors)
    digest.update(b"".join(itertools.chain.from_iterable(zip(_packed(layout), checksums, strict=True))))
    return bytes(digest.digest())


def validate(manifest: policy_pb2.Manifest) -> None:
    """Raise ManifestError unless the manifest is complete, consistent, and matches its own checksum."""
    if manifest.checksum_kind not in policy_pb2.ChecksumKind.values():
        raise ManifestError(f"the checksums are of kind {manifest.checksum_kind}, which is unknown here; update it")
    layout = _layout_of(manifest)
    end = _checked_end(layout)
    if end > manifest.total_bytes:
        raise ManifestError(f"tensors end at byte {end}, past the buffer's {manifest.total_bytes} bytes")
    for tensor in manifest.tensors:
        if (found := len(tensor.checksum)) != CHECKSUM_BYTES:
            raise ManifestError(f"tensor {tensor.name!r} has a checksum of {found} bytes instead of {CHECKSUM_BYTES}")
    if _checksum_over(layout, manifest) != manifest.checksum:
        raise ChecksumMismatch(f"manifest of {describe(manifest.version)} does not match its own checksum")


def _layout_of(manifest: policy_pb2.Manifest) -> bytes:
    """A manifest's tensors without their checksums, serialised: the same for every version of a model.

    What follows from it is kept from one version to the next, because hundreds of tensors take milliseconds.
    """
    layout = policy_pb2.Manifest(tensors=manifest.tensors)
    for tensor in layout.tensors:
        tensor.ClearField("checksum")
    return layout.SerializeToString(deterministic=True)


@functools.lru_cache(maxsize=4)
def _packed(layout: bytes) -> tuple[bytes, ...]:
    """What `manifest_checksum` hashes of each tensor before its checksum."""
    parts = []
    for tensor in policy_pb2.Manifest.FromString(layout).tensors:
        name, shape = tensor.name.encode(), tensor.shape
        size, rank = len(name), len(shape)
        parts.append(struct.pack(f"<I{size}sII{rank}QQ", size, name, tensor.dtype, rank, *shape, tensor.offset))
    return tuple(parts)


@functools.lru_cache(maxsize=4)
def _checked_end(layout: bytes) -> int:
    """Check names, sizes and places of the tensors; return where the last one ends, in bytes."""
    end = 0
    names: set[str] = set()
    for tensor in policy_pb2.Manifest.FromString(layout).tensors:
        where = f"tensor {tensor.name!r}"
        if not tensor.name or tensor.name in names:
            raise ManifestError(f"{where} has an empty or repeated name")
        names.add(tensor.name)
        expected = math.prod(tensor.shape) * _dtype_bytes(tensor.name, tensor.dtype)
        if tensor.nbytes != expected:
            raise ManifestError(f"{where} declares {tensor.nbytes} bytes; its dtype and shape need {expected}")
        if tensor.offset < end or tensor.offset % ALIGNMENT:
            raise ManifestError(
                f"{where} starts at byte {tensor.offset}; it must start at a multiple of {ALIGNMENT} at or after {end}"
            )
        end = tensor.offset + tensor.nbytes
    return end


def describe(version: policy_pb2.WeightVersion) -> str:
    """A version as people read it, e.g. `policy version 3 of job grpo-1`."""
    return f"{stream_name(version.stream)} version {version.version} of job {version.job_id}"


def stream_name(stream: policy_pb2.WeightStream.ValueType) -> str:
    """`policy` or `draft`; for any other number, the number."""
    names = {policy_pb2.WEIGHT_STREAM_POLICY: "policy", policy_pb2.WEIGHT_STREAM_DRAFT: "draft"}
    return names.get(stream, f"stream {stream}")


def _dtype_bytes(name: str, dtype: int) -> int:
    if dtype not in DTYPE_BYTES:
        raise ManifestError(f"tensor {name!r} has dtype number {dtype}; known are {sorted(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]
