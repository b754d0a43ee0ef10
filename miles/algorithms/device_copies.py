"""Copies from host memory to a device that do not wait for what the device still computes."""

from __future__ import annotations

import torch


def to_device(host: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A copy on the device; on a GPU it is queued behind earlier work, and `host` may be freed or changed at once."""
    device = torch.device(device)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
