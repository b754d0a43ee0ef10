"""Which device this machine computes on, found out without importing PyTorch."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
from typing import Literal


def visible_gpus() -> int:
    """NVIDIA GPUs that this process may use."""
    present = len(list(pathlib.Path("/dev").glob("nvidia[0-9]*")))
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return present
    return min(present, len([gpu for gpu in allowed.split(",") if gpu.strip() not in ("", "-1")]))


def detect_device() -> Literal["cpu", "cuda"]:
    """cuda when there is a GPU and the installed PyTorch is not a CPU build, else cpu."""
    try:
        cpu_build = importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        cpu_build = True
    return "cuda" if visible_gpus() and not cpu_build else "cpu"
