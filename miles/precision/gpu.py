"""Whether a tensor can be rounded by the kernels of `gpu_kernels`, which have the results of the formats' own code."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from types import ModuleType

import torch


def kernels_for(tensor: torch.Tensor) -> ModuleType | None:
    """The kernels; None for a tensor on the CPU or without numbers, and where Triton cannot build them."""
    if not tensor.is_cuda or not tensor.numel() or not _can_build():
        return None
    from miles.precision import gpu_kernels

    return gpu_kernels


@functools.cache
def _can_build() -> bool:
    """Triton builds what starts its kernels with a C compiler."""
    compilers = ("CC" in os.environ, *map(shutil.which, ("cc", "gcc", "clang")))
    return importlib.util.find_spec("triton") is not None and any(compilers)
