"""The process group of all ranks, and the device of this one."""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from miles.config.checks.device import detect_device


def join(device_name: str, backend: str | None, timeout_minutes: float) -> torch.device:
    """Choose this rank's device and make the process group; without torchrun it has this process alone."""
    name = detect_device() if device_name == "auto" else device_name
    device = torch.device(name)
    if name == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = backend or ("nccl" if name == "cuda" else "gloo")
    kinds = "cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo"
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(kinds, timeout=timeout)
    else:
        dist.init_process_group(kinds, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    return device
