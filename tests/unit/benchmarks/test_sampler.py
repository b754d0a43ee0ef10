"""Sampling what the main thread of a program does."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time

DEADLINE_S = 60.0
PROGRAM = """
def compute_much():
    return sum(i * i for i in range(1000))

while True:
    compute_much()
"""


def test_each_time_that_it_is_asked_the_sampler_tells_where_the_program_computes(tmp_path: pathlib.Path) -> None:
    (tmp_path / "computes.py").write_text(PROGRAM)
    out, switch = tmp_path / "samples", tmp_path / "samples.on"
    command = [sys.executable, str(pathlib.Path("benchmarks/gpu/sampler.py").resolve()), str(out), "-m", "computes"]
    with subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}) as program:
        try:
            for _ in range(3):
                until, found = time.monotonic() + DEADLINE_S, ""
                while "computes.py:compute_much" not in found and time.monotonic() < until:
                    switch.touch()  # again and again: the program may take a while to start
                    time.sleep(0.2)
                    switch.unlink()
                    time.sleep(0.1)
                    found = out.read_text() if out.exists() else ""
                assert "computes.py:compute_much" in found
                out.unlink()
        finally:
            program.kill()
