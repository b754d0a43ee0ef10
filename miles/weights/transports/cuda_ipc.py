"""Weights in GPU memory that trainer and engines of one node share: only handles travel, as plain fields.

The trainer keeps a flat copy of each version's buckets on its GPU until no engine may ask for it. An engine copies them
on the device, or from one GPU to another, while it prefetches: what it serves does not depend on the trainer's life.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import pathlib
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch

from miles.rpc.gen import policy_pb2, weightsource_pb2, weightsync_pb2
from miles.weights import flat as flats
from miles.weights import manifest as manifests
from miles.weights.manifest import ManifestError
from miles.weights.transport import Endpoint, SendTimes, default_threads, match

_BOOT_ID = pathlib.Path("/proc/sys/kernel/random/boot_id")


class CudaIpcTransport:
    """Implements WeightTransport between processes whose GPUs are in one node."""

    def __init__(self, endpoint: Endpoint) -> None:
        """`endpoint.device` is the trainer rank's own GPU, or the engine's."""
        self._device = endpoint.device
        self._staged: dict[int, list[_Bucket]] = {}
        self._spare: dict[int, list[_Bucket]] = {}
        """By size; the handle of memory that is used again stays the same."""
        self._threads = concurrent.futures.ThreadPoolExecutor(default_threads(), thread_name_prefix="weight-checksum")

    def send(
        self,
        handle: weightsync_pb2.TransportHandle,
        descriptors: Sequence[policy_pb2.TensorDescriptor],
        tensors: Iterable[tuple[str, torch.Tensor]],
    ) -> SendTimes:
        """Copy a bucket into device memory of its own and add its handle."""
        began = time.monotonic()
        base, nbytes = flats.extent(descriptors)
        if nbytes == 0:
            flats.set_checksums(torch.empty(0, dtype=torch.uint8), descriptors, base, self._threads)
            return SendTimes()
        bucket = self._bucket(nbytes)
        flat = bucket.flat
        flats.clear_gaps(flat, descriptors)
        for descriptor, tensor in match(descriptors, tensors):
            flats.view(flat, descriptor, base).copy_(tensor, non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        copied = time.monotonic()
        flats.set_checksums(flat, descriptors, base, self._threads)
        self._staged.setdefault(handle.publication_id, []).append(bucket)
        handle.cuda_ipc.boot_id = boot_id()
        handle.cuda_ipc.buckets.append(encode_bucket(bucket.share, device_uuid(self._device), base, nbytes))
        return SendTimes(copied - began, time.monotonic() - copied, sum(d.nbytes for d in descriptors))

    def seal(self, handle: weightsync_pb2.TransportHandle, manifest: policy_pb2.Manifest) -> None:
        """Check that the ranks' buckets make up the version."""
        flats.check_covered(manifest, ((bucket.offset, bucket.nbytes) for bucket in handle.cuda_ipc.buckets))

    def discard(self, handle: weightsync_pb2.TransportHandle) -> None:
        """Free the version's buckets."""
        for bucket in self._staged.pop(handle.publication_id, []):
            bucket.free()

    def receive(self, handle: weightsync_pb2.TransportHandle, manifest: policy_pb2.Manifest) -> flats.FlatWeights:
        """Copy every bucket and verify every tensor."""
        manifests.validate(manifest)
        flats.check_covered(manifest, ((bucket.offset, bucket.nbytes) for bucket in handle.cuda_ipc.buckets))
        if handle.cuda_ipc.boot_id != boot_id():
            raise ManifestError("the weights are in GPU memory of another machine; use a transport between machines")
        whole = torch.empty(manifest.total_bytes, dtype=torch.uint8, device=self._device)
        for bucket in handle.cuda_ipc.buckets:
            theirs = open_shared(decode_bucket(bucket, device_index(bucket.device_uuid)))
            whole[bucket.offset : bucket.offset + bucket.nbytes].copy_(theirs[: bucket.nbytes])
            torch.cuda.synchronize(theirs.device)
        flats.verify({0: whole}, manifest, "GPU memory of the trainer", self._threads)
        return flats.FlatWeights({0: whole}, manifest.tensors)

    def trim(self, live: Collection[int] | None = None) -> None:
        """Use the memory of versions that are not live for the next one, or free it."""
        if live is None:
            return
        self._free_spare()
        for publication_id in set(self._staged) - set(live):
            for bucket in self._staged.pop(publication_id):
                self._spare.setdefault(bucket.flat.numel(), []).append(bucket)

    def close(self) -> None:
        """Free every bucket."""
        self._free_spare()
        for buckets in self._staged.values():
            for bucket in buckets:
                bucket.free()
        self._staged.clear()
        self._threads.shutdown()

    def _bucket(self, nbytes: int) -> _Bucket:
        if spare := self._spare.get(nbytes):
            return spare.pop()
        flat = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return _Bucket(flat, shared(flat))

    def _free_spare(self) -> None:
        for buckets in self._spare.values():
            for bucket in buckets:
                bucket.free()
        self._spare.clear()


Shared = tuple[int, bytes, int, int, bytes, int, bytes, bool]
"""What torch needs to open a storage of another process: device index, handle of the allocation, size and offset of the
storage in bytes, file and place of its reference counter, handle of an event to wait for, whether to wait for it."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Bucket:
    flat: torch.Tensor
    share: Shared

    def free(self) -> None:
        """Have the memory freed with the last tensor, though torch counts a receiver that may never have come."""
        _, _, _, _, counter, counter_offset, _, _ = self.share
        storages: Any = torch.UntypedStorage
        storages._release_ipc_counter_cuda(counter, counter_offset)


def encode_bucket(share: Shared, uuid: str, offset: int, nbytes: int) -> weightsource_pb2.CudaIpcBucket:
    """A shared storage that holds the bytes of the version's buffer at `offset`, as it is sent."""
    _, memory, size, start, counter, counter_offset, event, must_wait = share
    return weightsource_pb2.CudaIpcBucket(
        device_uuid=uuid,
        memory_handle=memory,
        storage_nbytes=size,
        storage_offset=start,
        counter_handle=counter,
        counter_offset=counter_offset,
        event_handle=event,
        event_sync_required=must_wait,
        offset=offset,
        nbytes=nbytes,
    )


def decode_bucket(bucket: weightsource_pb2.CudaIpcBucket, device: int) -> Shared:
    """Inverse of `encode_bucket`, for the GPU that has index `device` here; ManifestError for impossible sizes."""
    if bucket.nbytes > bucket.storage_nbytes:
        raise ManifestError(f"a bucket of {bucket.nbytes} bytes cannot lie in a storage of {bucket.storage_nbytes}")
    return (
        device,
        bucket.memory_handle,
        bucket.storage_nbytes,
        bucket.storage_offset,
        bucket.counter_handle,
        bucket.counter_offset,
        bucket.event_handle,
        bucket.event_sync_required,
    )


def shared(flat: torch.Tensor) -> Shared:
    """Share the storage of a tensor on a GPU."""
    storage: Any = flat.untyped_storage()
    share: Shared = storage._share_cuda_()
    return share


def open_shared(share: Shared) -> torch.Tensor:
    """The storage of another process as uint8 (n,); ManifestError when it is gone or cannot be opened."""
    torch.cuda._lazy_init()  # type: ignore[no-untyped-call]
    storages: Any = torch.UntypedStorage
    try:
        storage = storages._new_shared_cuda(*share)
    except RuntimeError as error:
        raise ManifestError(f"the trainer's GPU memory cannot be opened: {error}") from error
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def device_uuid(device: torch.device) -> str:
    """Names a GPU in every process of the node."""
    return str(torch.cuda.get_device_properties(device).uuid)


def device_index(uuid: str) -> int:
    """The index that a GPU has in this process; ManifestError when it is not visible here."""
    for index in range(torch.cuda.device_count()):
        if device_uuid(torch.device("cuda", index)) == uuid:
            return index
    raise ManifestError(
        f"the weights are on GPU {uuid}, which this process does not see; make it visible (CUDA_VISIBLE_DEVICES)"
    )


def boot_id() -> str:
    """Names this machine since its start."""
    return _BOOT_ID.read_text().strip()
