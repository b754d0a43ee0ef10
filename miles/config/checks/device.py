"""The device that this machine computes on, found without importing PyTorch."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import pathlib
from typing import Literal


def visible_gpus() -> int:
    """Return the number of NVIDIA GPUs that this process may use."""
    present = len(list(pathlib.Path("/dev").glob("nvidia[0-9]*")))
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return present
    return min(present, len([gpu for gpu in allowed.split(",") if gpu.strip() not in ("", "-1")]))


def detect_device() -> Literal["cpu", "cuda"]:
    """Return cuda when there is a GPU and PyTorch is installed and not a CPU build, else cpu."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        cpu_build = importlib.metadata.version("torch").endswith("+cpu")
        return "cuda" if visible_gpus() and not cpu_build else "cpu"
    return "cpu"
