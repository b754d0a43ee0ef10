from __future__ import annotations

import os
import subprocess
import sys

import torch

from miles.precision.speed import cpu_slowdown, worker_speed

PROGRAM = "from miles.precision.speed import cpu_slowdown; import torch; print(cpu_slowdown(torch.bfloat16))"


def test_a_type_is_as_fast_as_itself() -> None:
    assert 0.2 < cpu_slowdown(torch.float32) < 5


def test_a_processor_that_may_not_use_its_newer_instructions_is_slow_in_bfloat16() -> None:
    """Whatever the processor has: oneDNN is told to do without."""
    limited = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    printed = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=limited, capture_output=True, text=True, timeout=120, check=True
    )
    assert float(printed.stdout) > 1


def test_a_worker_on_the_cpu_says_how_slow_16_bit_types_are() -> None:
    speed = worker_speed("cpu")
    assert speed.keys() == {"bfloat16_slowdown", "float16_slowdown"}
    assert all(slowdown > 0 for slowdown in speed.values())
