"""Weights through folders on shared storage, which hold what changed since an earlier version.

The trainer's ranks write files into a partial folder; rank 0 adds the index and renames it, so a version is complete or
absent, and never changes afterwards. The weightsync service names the folders, asks for a full version every so often,
and removes folders that no engine needs, neither themselves nor as the base of another.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np
import torch

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.weights import manifest as manifests
from miles.weights.base import ReceivedWeights, SendTimes
from miles.weights.bucketing import match_layout
from miles.weights.dtypes import TORCH_DTYPE
from miles.weights.manifest import DTYPE_BYTES, ManifestError, checksum_threads
from miles.weights.staging.ring import pinned_ring
from miles.weights.staging.to_host import ToHost
from miles.weights.transports.disk_delta.codec import Bytes, Encoding, encode, pieces
from miles.weights.transports.disk_delta.files import Base, Index, Reader, Stored, write_file
from miles.weights.transports.disk_delta.reader import FolderReader

_WORTH_IT = 0.9
"""A change larger than this share of the tensor is not worth encoding: the tensor is written raw, which is faster."""


class DiskDeltaTransport:
    """Implements WeightTransport. Sender and receiver keep the last version, which the next one's changes apply to."""

    def __init__(self) -> None:
        self._threads = concurrent.futures.ThreadPoolExecutor(checksum_threads(), thread_name_prefix="weight-delta")
        self._kept: dict[str, _Kept] = {}
        """Tensors as they were sent last."""
        self._reader = FolderReader(self._threads)

    def send(
        self,
        handle: weightsync_pb2.TransportHandle,
        descriptors: Sequence[policy_pb2.TensorDescriptor],
        tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        lasting: bool = False,
    ) -> SendTimes:
        """Write one bucket as one file; a tensor whose bytes in the base are unknown is written raw."""
        began = time.monotonic()
        folder = pathlib.Path(handle.disk_delta.partial_path)
        folder.mkdir(parents=True, exist_ok=True)
        encoded = [
            self._encode(handle, descriptor, new)
            for descriptor, new in self._on_host(match_layout(descriptors, tensors), copied=not lasting)
        ]
        stored = [_gather(each) for each in encoded]
        encoding_s = time.monotonic() - began
        if not stored:
            return SendTimes(copy_s=encoding_s)
        written = write_file(folder / f"part-{descriptors[0].offset:012d}.safetensors", stored)
        return SendTimes(copy_s=time.monotonic() - began, written_bytes=written)

    def seal(self, handle: weightsync_pb2.TransportHandle, manifest: policy_pb2.Manifest) -> None:
        """Check that the ranks' files hold every tensor once, write the index, and give the folder its name."""
        delta = handle.disk_delta
        partial, path = pathlib.Path(delta.partial_path), pathlib.Path(delta.path)
        files = sorted(partial.glob("part-*.safetensors"))
        stored = [tensor for file in files for tensor in _headers(file)]
        _check_complete(partial, stored, manifest)
        base = None
        if any(tensor.encoding is not Encoding.RAW for tensor in stored):
            base_path = pathlib.Path(delta.base_path)
            before = Index.read(base_path)
            base = Base(base_path.name, delta.base_publication_id, before.checksum)
            manifest.base_version = before.version
        else:
            delta.base_path, delta.base_publication_id = "", 0
        index = Index(
            version=manifest.version.version,
            publication_id=handle.publication_id,
            checksum=manifest.checksum.hex(),
            base=base,
            files={file.name: file.stat().st_size for file in files},
        )
        index.write(partial)
        _flush_folder(partial)
        partial.rename(path)
        _flush_folder(path.parent)

    def discard(self, handle: weightsync_pb2.TransportHandle) -> None:
        """Remove what was written."""
        shutil.rmtree(handle.disk_delta.partial_path, ignore_errors=True)

    def receive(self, handle: weightsync_pb2.TransportHandle, manifest: policy_pb2.Manifest) -> ReceivedWeights:
        """Build the version in memory, from the last one if the folder is a change to it."""
        return self._reader.receive(handle, manifest)

    def trim(self, live: Collection[int] | None = None) -> None:
        """Forget the bytes of publications that can no longer be a base."""
        if live is not None:
            self._kept = {name: kept for name, kept in self._kept.items() if kept.publication_id in live}

    def close(self) -> None:
        """Forget all bytes."""
        self._kept.clear()
        self._reader.forget()
        self._threads.shutdown()

    def _on_host(
        self, pairs: Iterable[tuple[policy_pb2.TensorDescriptor, torch.Tensor]], *, copied: bool
    ) -> Iterator[tuple[policy_pb2.TensorDescriptor, Bytes]]:
        """Each tensor's bytes in its descriptor's type; those of a GPU's come after all of the others'."""
        arriving: list[tuple[policy_pb2.TensorDescriptor, Bytes]] = []
        with ToHost(pinned_ring(), self._threads) as from_gpu:
            for descriptor, tensor in pairs:
                if tensor.is_cuda:
                    arriving.append((descriptor, np.empty(descriptor.nbytes, np.uint8)))
                    from_gpu.add(descriptor, tensor, arriving[-1][1])
                else:
                    yield descriptor, _bytes_of(tensor, descriptor, copied=copied)
        yield from arriving

    def _encode(
        self,
        handle: weightsync_pb2.TransportHandle,
        descriptor: policy_pb2.TensorDescriptor,
        new: Bytes,
    ) -> _Encoded:
        """Begin to encode a tensor, of which nobody changes the bytes, on other threads."""
        delta, itemsize = handle.disk_delta, DTYPE_BYTES[descriptor.dtype]
        before = self._kept.get(descriptor.name)
        unchanged = before is not None and _same_memory(before.data, new)
        checksum = before.checksum if before and unchanged else self._threads.submit(manifests.checksum, new.data)
        self._kept[descriptor.name] = _Kept(handle.publication_id, new, checksum)
        based = before is not None and delta.base_path and before.publication_id == delta.base_publication_id
        if before is None or not based or before.data.size != new.size:
            return _Encoded(descriptor, Encoding.RAW, new, checksum, [])
        if unchanged:
            return _Encoded(descriptor, Encoding.SAME, new, checksum, [])
        overwrite = delta.encoding == weightsync_pb2.DELTA_ENCODING_OVERWRITE
        encoding, old = Encoding.OVERWRITE if overwrite else Encoding.XOR, before.data
        frames = [
            self._threads.submit(encode, encoding, old[piece], new[piece], itemsize) for piece in pieces(new.size)
        ]
        return _Encoded(descriptor, encoding, new, checksum, frames)


@dataclasses.dataclass(frozen=True, slots=True)
class _Kept:
    """A tensor as it was sent last."""

    publication_id: int
    data: Bytes
    checksum: concurrent.futures.Future[bytes]


@dataclasses.dataclass(frozen=True, slots=True)
class _Encoded:
    """A tensor that is being encoded on other threads."""

    descriptor: policy_pb2.TensorDescriptor
    encoding: Encoding
    new: Bytes
    checksum: concurrent.futures.Future[bytes]
    frames: list[concurrent.futures.Future[bytes]]


def _bytes_of(tensor: torch.Tensor, descriptor: policy_pb2.TensorDescriptor, *, copied: bool) -> Bytes:
    """Bytes of a tensor in host memory in the descriptor's type, copied where that is asked for or unavoidable."""
    dtype = TORCH_DTYPE[descriptor.dtype]
    if copied or tensor.dtype != dtype or not tensor.is_contiguous():
        tensor = torch.empty(tuple(descriptor.shape), dtype=dtype).copy_(tensor)
    data: Bytes = tensor.reshape(-1).view(torch.uint8).numpy()
    return data


def _same_memory(left: Bytes, right: Bytes) -> bool:
    return left.size == right.size and left.ctypes.data == right.ctypes.data


def _gather(encoded: _Encoded) -> Stored:
    """Wait for a tensor's encoding; return what to write."""
    descriptor, encoding, new = encoded.descriptor, encoded.encoding, encoded.new
    frames = [future.result() for future in encoded.frames]
    content: list[bytes] | list[memoryview] = frames
    size = sum(map(len, frames))
    if encoding is Encoding.RAW or size > _WORTH_IT * new.size:
        encoding, content, frames = Encoding.RAW, [new.data], []
    elif not size:
        encoding, content, frames = Encoding.SAME, [], []
    value = encoded.checksum.result()
    if not descriptor.checksum:
        descriptor.checksum = value
    return Stored(
        name=descriptor.name,
        dtype=descriptor.dtype,
        shape=tuple(descriptor.shape),
        encoding=encoding,
        checksum=value,
        frames=tuple(map(len, frames)),
        content=content,
    )


def _headers(path: pathlib.Path) -> list[Stored]:
    reader = Reader(path)
    reader.close()
    return reader.tensors


def _check_complete(folder: pathlib.Path, stored: Sequence[Stored], manifest: policy_pb2.Manifest) -> None:
    """Raise ManifestError unless every tensor of the manifest is stored once, with the manifest's checksum."""
    wanted = {descriptor.name: descriptor.checksum for descriptor in manifest.tensors}
    found = {tensor.name: tensor.checksum for tensor in stored}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong or len(stored) != len(wanted):
        raise ManifestError(
            f"{folder} holds {len(stored)} tensors of the {len(wanted)} of {manifests.describe(manifest.version)}; "
            f"missing or different: {', '.join(wrong[:3]) or 'none, but some are stored twice'}"
        )


def _flush_folder(path: pathlib.Path) -> None:
    """Flush a folder's file names to disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.ExitStack() as at_end:
        at_end.callback(os.close, fd)
        os.fsync(fd)
