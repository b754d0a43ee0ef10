"""Kernels of `miles.precision.gpu_kernels` in Triton's interpreter on the CPU: prints as JSON what is equal to the bit.

Runs in an environment that has Triton. Float32 alone: the interpreter cuts numbers off where it converts to bfloat16.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator

os.environ["TRITON_INTERPRET"] = "1"

import torch
from format_cases import FORMATS, GROUP, matrices, numbers_that_are_not_finite, same

from miles.precision import gpu_kernels
from miles.precision.int4 import SMALLEST_SCALE


def compared(shape: tuple[int, ...]) -> Iterator[tuple[str, bool]]:
    """What is compared, and whether it is equal."""
    dtype = torch.float32
    for case, weight in [*matrices(shape, dtype), *numbers_that_are_not_finite(shape, dtype)]:
        for name, powers in (("fp8_block", False), ("fp8_block, powers of two", True)):
            form = FORMATS[name]
            yield f"{name}, {case}", same(form.rounded(weight), gpu_kernels.round_fp8_weight(weight, powers))
            yield f"{name}, rows, {case}", same(form.rounded_rows(weight), gpu_kernels.round_fp8_rows(weight, powers))
        rounded = gpu_kernels.round_int4(weight, GROUP, SMALLEST_SCALE)
        yield f"int4, {case}", same(FORMATS["int4"].rounded(weight), rounded)


if __name__ == "__main__":
    json.dump(dict(compared((2, 40, 160))), sys.stdout)
