"""Measures how fast this machine multiplies 16-bit matrices, compared with float32."""

from __future__ import annotations

import time

import torch

from miles.precision.number_types import slowdown_key

_SIZES = (384, 1024)
"""Rows and columns. The small product takes at most a tenth of a second, also on processors that are slow in a type.
When it is not conclusive the large one decides, which is compute-bound on many cores too."""
_CLEAR = 3.0
_FEWEST, _MOST, _ENOUGH_S = 3, 20, 0.3


def cpu_slowdown(dtype: torch.dtype) -> float:
    """Return the time of a matrix product in `dtype` over that in float32, on the CPU; above 1 `dtype` is slower.

    Processors without instructions for a type convert in software and are 2 to 50 times slower. Checking the CPU's
    features instead would miss those that oneDNN was told not to use (ONEDNN_MAX_CPU_ISA).
    """
    for size in _SIZES:
        slowdown = _slowdown(dtype, size)
        if not 1 / _CLEAR < slowdown < _CLEAR:
            break
    return slowdown


def _slowdown(dtype: torch.dtype, size: int) -> float:
    """Compare the fastest of many alternating runs, so that other work on the machine has little influence."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator) for _ in range(2))
    pairs = [(left, right), (left.to(dtype), right.to(dtype))]
    fastest = [float("inf"), float("inf")]
    for a, b in pairs:
        a @ b  # the first product of a type sets up its kernels
    end = time.perf_counter() + _ENOUGH_S
    for repeat in range(_MOST):
        if repeat >= _FEWEST and time.perf_counter() > end:
            break
        for kind, (a, b) in enumerate(pairs):
            began = time.perf_counter()
            a @ b
            fastest[kind] = min(fastest[kind], time.perf_counter() - began)
    return fastest[1] / fastest[0]


def worker_speed(device: str) -> dict[str, float]:
    """Return the ratios a worker registers, for `number_types.decide`; nothing on a GPU with bfloat16 units.

    Args:
        device: The worker's device: "auto", "cpu", "cuda" or "cuda:1".
    """
    if device != "cpu" and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        return {}
    types = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    return {slowdown_key(name): round(cpu_slowdown(dtype), 3) for name, dtype in types.items()}
