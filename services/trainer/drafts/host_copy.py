"""A copy in host memory of what a model holds on a GPU, made in one go."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from miles.weights.manifest import offsets


class HostCopy:
    """Host memory for tensors of a device, allocated at the first copy and kept.

    Pinned for a GPU: what is not pinned is copied piece by piece, with a wait for the device at each tensor.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)

    def of(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Contiguous copies on the CPU, which the next call overwrites."""
        starts, nbytes = offsets(each.nbytes for each in tensors.values())
        if nbytes > len(self._memory):
            self._memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        found = {}
        for (name, tensor), start in zip(tensors.items(), starts, strict=True):
            place = self._memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            found[name] = place.copy_(tensor.detach(), non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return found
