"""Buckets of host tensors in GPU memory, for servers that would copy slowly from the host's.

SGLang copies a tensor in host memory straight into its parameter, from memory that is not pinned, and waits for each.
Here a version goes to the GPU through staging buffers, before the server pauses where there is room, and the server
gets handles, as for weights that arrive in GPU memory.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

import torch

from miles.services.rollout.engines.sglang.weights.buckets import Bucket, NamedTensor, flatten, flatten_to, in_buckets
from miles.threads import Threads
from miles.weights.manifest import checksum_threads
from miles.weights.staging.ahead import PART_OF_FREE, free_bytes
from miles.weights.staging.ring import StagingRing, pinned_ring
from miles.weights.staging.to_device import Parts, copy_to_device

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """Buckets of a version on one GPU."""

    parts: Sequence[Sequence[NamedTensor]]
    """The tensors of each."""
    room_bytes: int
    """For those that exist at the same time."""


class GpuBuckets:
    """Makes buckets on GPUs; any thread may call it."""

    def __init__(self, ring: StagingRing | None = None, free_bytes: Callable[[torch.device], int] = free_bytes) -> None:
        """`free_bytes`: what is free on a GPU."""
        self._ring = ring or pinned_ring()
        self._free_bytes = free_bytes
        self._threads = Threads(checksum_threads(), thread_name_prefix="weight-staging")

    def plan(self, tensors: Sequence[NamedTensor], bucket_bytes: int, gpu: torch.device) -> Plan | None:
        """Which buckets to make there; None when there is too little room.

        Everything is one bucket if it fits, which is then all there before the server pauses.
        """
        try:
            room = self._free_bytes(gpu) // PART_OF_FREE
        except RuntimeError as error:  # no room for a context either
            log.warning("weights go through shared memory, more slowly: %s", error)
            return None
        if _nbytes(tensors) <= room:
            return Plan([tensors], room)
        parts = list(in_buckets(tensors, bucket_bytes))
        return Plan(parts, room) if 2 * max(map(_nbytes, parts)) <= room else None

    def make(self, tensors: Sequence[NamedTensor], gpu: torch.device) -> Bucket:
        """A bucket on the GPU; in shared memory when that fails, as others may have taken what was free."""

        def fill(flat: torch.Tensor, parts: Parts) -> None:
            copy_to_device(flat, parts, self._ring, self._threads)

        try:
            return flatten_to(gpu, tensors, fill)
        except RuntimeError as error:
            log.warning("weights go through shared memory, more slowly: %s", error)
            return flatten(tensors)

    def free_memory(self) -> None:
        """Give back the memory of buckets that are no more, once servers have let go of it."""
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()


def _nbytes(tensors: Sequence[NamedTensor]) -> int:
    return sum(tensor.nbytes for _, tensor in tensors)
