"""Whether a trainer and an engine can share GPU memory: one opens a few bytes of the other's and reads them.

An engine shares some bytes as long as it is subscribed, and the trainer opens them, which is the opposite of how
versions go. CUDA allows both or neither, as long as both processes allocate memory in the same way, which is compared:
it depends on the node, on what the processes' containers share, and on the GPUs that they see.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
from collections.abc import Sequence

import torch

from miles.rpc.gen import weightsource_pb2
from miles.weights.manifest import ManifestError
from miles.weights.transports.cuda_ipc.sharing import (
    SharedBucket,
    boot_id,
    decode_bucket,
    device_index,
    device_uuid,
    encode_bucket,
    open_shared,
    share,
)
from miles.weights.usable_transports import fits_gpu_memory

logger = logging.getLogger(__name__)

_TOKEN_BYTES = 16
_CUDA_MALLOC = b"c"
"""Second byte of torch's handles, after their version: the memory is from cudaMalloc.

Expandable segments are handed over as file descriptors of the other process instead, which one of two processes may be
allowed and the other not.
"""


@dataclasses.dataclass(frozen=True, slots=True)
class SharedProbe:
    """A token in GPU memory that other processes can open, until `free`."""

    message: weightsource_pb2.GpuMemoryProbe
    bucket: SharedBucket

    def free(self) -> None:
        """Take the memory back, whether somebody has opened it or not."""
        self.bucket.free()


def share_probe(device: torch.device, version_nbytes: int = 0) -> SharedProbe | None:
    """Share a new token in the memory of a GPU.

    None when versions are too large to go there, for then a context on the GPU would take memory for nothing; and, with
    a warning in the log, when memory cannot be shared from here. `version_nbytes` is 0 before the first version, when
    the size is unknown: memory is then shared, so that a small model's first version can go there.
    """
    token = secrets.token_bytes(_TOKEN_BYTES)
    try:
        gpu_nbytes = torch.cuda.get_device_properties(device).total_memory
        if not fits_gpu_memory(version_nbytes, gpu_nbytes):
            return None
        flat = torch.frombuffer(bytearray(token), dtype=torch.uint8).to(device)
        torch.cuda.synchronize(device)
        bucket = SharedBucket(flat, share(flat))
    except RuntimeError as error:  # of the driver or the allocator; weights then go another way
        logger.warning("%s cannot share memory with other processes: %s", device, error)
        return None
    message = weightsource_pb2.GpuMemoryProbe(
        boot_id=boot_id(),
        memory=encode_bucket(bucket.share, device_uuid(device), 0, len(token)),
        token=token,
        visible_gpus=[device_uuid(torch.device("cuda", index)) for index in range(torch.cuda.device_count())],
        gpu_nbytes=gpu_nbytes,
    )
    return SharedProbe(message, bucket)


def open_probes(
    probes: Sequence[weightsource_pb2.GpuMemoryProbe], device: torch.device, rank: int = 0
) -> weightsource_pb2.OpenedGpuMemory:
    """Find out which engines can share GPU memory with this rank of the trainer, whose own GPU is `device`.

    Rank 0 opens their memory. The others run on the same node by the same launcher, or their engines' memory is of
    another node; opening it, they would all take memory for a context on every engine's GPU.
    """
    mine = share_probe(device)
    if mine is None:
        return weightsource_pb2.OpenedGpuMemory()
    try:
        found = [probe for probe in probes if suits(probe, mine.message) and (rank or _opens(probe))]
    finally:
        mine.free()
    return weightsource_pb2.OpenedGpuMemory(tokens=[probe.token for probe in found], gpu_nbytes=mine.message.gpu_nbytes)


def merge_opened(reports: Sequence[weightsource_pb2.OpenedGpuMemory]) -> weightsource_pb2.OpenedGpuMemory:
    """What all ranks have found: the engines that each of them can share memory with, and the smallest GPU."""
    common = set.intersection(*(set(report.tokens) for report in reports))
    return weightsource_pb2.OpenedGpuMemory(
        tokens=sorted(common), gpu_nbytes=min(report.gpu_nbytes for report in reports)
    )


def suits(engine: weightsource_pb2.GpuMemoryProbe, trainer: weightsource_pb2.GpuMemoryProbe) -> bool:
    """Whether engine and trainer are on one node, allocate alike, and the engine sees the trainer's GPU."""
    allocation = trainer.memory.memory_handle[:2]
    return (
        engine.boot_id == trainer.boot_id
        and engine.memory.memory_handle[:2] == allocation
        and allocation[1:] == _CUDA_MALLOC
        and trainer.memory.device_uuid in engine.visible_gpus
    )


def _opens(probe: weightsource_pb2.GpuMemoryProbe) -> bool:
    """Open an engine's memory and compare what is in it; the reason why it cannot be opened goes into the log."""
    try:
        theirs = open_shared(decode_bucket(probe.memory, device_index(probe.memory.device_uuid)))
    except ManifestError as error:
        logger.warning("weights cannot go through GPU memory: %s", error)
        return False
    return bytes(theirs[: probe.memory.nbytes].tolist()) == probe.token
