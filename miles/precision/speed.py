"""How fast this machine multiplies matrices of 16-bit numbers, compared with float32."""

from __future__ import annotations

import time

import torch

from miles.precision.number_types import slowdown_key

_SIZE = 384
"""Rows and columns: large enough to be bound by arithmetic, a tenth of a second at worst on slow processors."""
_REPEATS = 3


def cpu_slowdown(dtype: torch.dtype) -> float:
    """Time of a matrix product in `dtype` over that of the same in float32, on the CPU; above 1 `dtype` is the slower.

    Processors without instructions for a type convert in software and are 2 to 50 times slower; asking which
    instructions there are would miss what oneDNN was told not to use (ONEDNN_MAX_CPU_ISA). Takes the fastest of a few
    runs in turn, so that other work on the machine hardly shows.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(_SIZE, _SIZE, generator=generator) for _ in range(2))
    pairs = [(left, right), (left.to(dtype), right.to(dtype))]
    fastest = [float("inf"), float("inf")]
    for repeat in range(_REPEATS + 1):
        for kind, (a, b) in enumerate(pairs):
            began = time.perf_counter()
            a @ b
            if repeat:  # the first product of a type sets up its kernels
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
