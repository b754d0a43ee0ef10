"""A version in host memory, copied to a device while an engine goes on with the one before."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch

from miles.threads import Threads
from miles.weights.manifest import checksum_threads, offsets
from miles.weights.staging.ring import StagingRing, pinned_ring
from miles.weights.staging.to_device import copy_to_device, host_bytes

log = logging.getLogger(__name__)

PART_OF_FREE = 2
"""Copies take at most this part of what is free on a device, a half: others may need memory meanwhile."""


def free_bytes(gpu: torch.device) -> int:
    """What is free on a GPU, with what torch keeps in this process for later tensors."""
    kept = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
    return int(torch.cuda.mem_get_info(gpu)[0]) + kept


class AheadOnDevice:
    """Copies versions to one device. It blocks; call it from a worker thread, one call at a time."""

    def __init__(
        self,
        device: torch.device,
        ring: StagingRing | None = None,
        free_bytes: Callable[[torch.device], int] = free_bytes,
    ) -> None:
        """`free_bytes`: what is free on a device."""
        self._device = device
        self._ring = ring or pinned_ring()
        self._free_bytes = free_bytes
        self._threads = Threads(checksum_threads(), thread_name_prefix="weight-staging")

    def copied(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The tensors, by name, in one allocation on the device; as they are if there is too little room for them.

        Those that are on a GPU already are returned as they are, too.
        """
        if any(tensor.is_cuda for tensor in tensors.values()):
            return tensors
        begins, end = offsets(tensor.nbytes for tensor in tensors.values())
        try:
            if end > self._free_bytes(self._device) // PART_OF_FREE:
                return tensors
            flat = torch.empty(end, dtype=torch.uint8, device=self._device)
            parts = list(zip(begins, map(host_bytes, tensors.values()), strict=True))
            copy_to_device(flat, parts, self._ring, self._threads)
        except RuntimeError as error:
            log.warning("weights are copied to %s during the pause, more slowly: %s", self._device, error)
            return tensors
        return {
            name: flat[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for begin, (name, tensor) in zip(begins, tensors.items(), strict=True)
        }

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()
