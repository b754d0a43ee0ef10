"""A copy in host memory of what a model holds on a GPU, made in one go."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch

_ALIGNMENT = 512


class HostCopy:
    """Host memory for tensors of a device, allocated at the first copy and kept.

    Pinned for a GPU: what is not pinned is copied piece by piece, with a wait for the device at each tensor.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)

    def of(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Contiguous copies on the CPU, which the next call overwrites."""
        sizes = [math.ceil(each.nbytes / _ALIGNMENT) * _ALIGNMENT for each in tensors.values()]
        if sum(sizes) > len(self._memory):
            self._memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        starts = itertools.accumulate(sizes, initial=0)
        found = {}
        for (name, tensor), start in zip(tensors.items(), starts, strict=False):
            place = self._memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            found[name] = place.copy_(tensor.detach(), non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return found
