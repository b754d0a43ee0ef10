"""How fast this machine multiplies matrices of 16-bit numbers, compared with float32."""

from __future__ import annotations

import time

import torch

from miles.precision.number_types import slowdown_key

_SIZES = (384, 1024)
"""Rows and columns. The small product takes a tenth of a second at worst, on processors that are slow in a type. Where
it leaves the matter open the large one decides, which is bound by arithmetic on many cores too."""
_CLEAR = 3.0
_FEWEST, _MOST, _ENOUGH_S = 3, 20, 0.3


def cpu_slowdown(dtype: torch.dtype) -> float:
    """Time of a matrix product in `dtype` over that of the same in float32, on the CPU; above 1 `dtype` is the slower.

    Processors without instructions for a type convert in software and are 2 to 50 times slower; asking which
    instructions there are would miss what oneDNN was told not to use (ONEDNN_MAX_CPU_ISA).
    """
    for size in _SIZES:
        slowdown = _slowdown(dtype, size)
        if not 1 / _CLEAR < slowdown < _CLEAR:
            break
    return slowdown


def _slowdown(dtype: torch.dtype, size: int) -> float:
    """Takes the fastest of many runs in turn, so that other work on the machine hardly shows."""
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
    """What a worker tells the controller, for `number_types.decide`; nothing on a GPU that computes in bfloat16 itself.

    Args:
        device: What the worker computes on: "auto", "cpu", "cuda" or "cuda:1".
    """
    if device != "cpu" and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        return {}
    types = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    return {slowdown_key(name): round(cpu_slowdown(dtype), 3) for name, dtype in types.items()}
