"""GPU memory shared between processes, by the handles that torch makes for it."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import torch

from miles.rpc.gen import weightsource_pb2
from miles.weights.manifest import ManifestError

_BOOT_ID = pathlib.Path("/proc/sys/kernel/random/boot_id")

Shared = tuple[int, bytes, int, int, bytes, int, bytes, bool]
"""What torch needs to open a storage of another process: device index, handle of the allocation, size and offset of the
storage in bytes, file and offset of its reference counter, handle of an event to wait for, whether to wait for it."""


@dataclasses.dataclass(frozen=True, slots=True)
class SharedBucket:
    """A bucket in device memory that other processes can open."""

    flat: torch.Tensor
    share: Shared

    def free(self) -> None:
        """Let the memory go with its last tensor: torch counts one receiver, which may never have come."""
        _, _, _, _, counter, counter_offset, _, _ = self.share
        storages: Any = torch.UntypedStorage
        storages._release_ipc_counter_cuda(counter, counter_offset)


def encode_bucket(share: Shared, uuid: str, offset: int, nbytes: int) -> weightsource_pb2.CudaIpcBucket:
    """The message for a shared storage that holds `nbytes` bytes of the version's buffer from `offset` on."""
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
    """Inverse of `encode_bucket`, for the GPU with index `device` here; ManifestError for impossible sizes."""
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


def share(flat: torch.Tensor) -> Shared:
    """Share the storage of a tensor on a GPU."""
    storage: Any = flat.untyped_storage()
    handles: Shared = storage._share_cuda_()
    return handles


def open_shared(share: Shared) -> torch.Tensor:
    """Open the storage of another process as uint8 (n,); ManifestError when it is gone or cannot be opened."""
    torch.cuda._lazy_init()  # type: ignore[no-untyped-call]
    storages: Any = torch.UntypedStorage
    try:
        storage = storages._new_shared_cuda(*share)
    except RuntimeError as error:
        raise ManifestError(f"the other process's GPU memory cannot be opened: {error}") from error
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def device_uuid(device: torch.device) -> str:
    """Identifies a GPU in every process of the node."""
    return str(torch.cuda.get_device_properties(device).uuid)


def device_index(uuid: str) -> int:
    """Index of a GPU in this process; ManifestError when it is not visible here."""
    for index in range(torch.cuda.device_count()):
        if device_uuid(torch.device("cuda", index)) == uuid:
            return index
    raise ManifestError(
        f"the memory is of GPU {uuid}, which this process does not see; make it visible (CUDA_VISIBLE_DEVICES)"
    )


def boot_id() -> str:
    """Identifies this machine until its next boot."""
    return _BOOT_ID.read_text().strip()
