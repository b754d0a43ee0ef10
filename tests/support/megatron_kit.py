"""Starting processes that run megatron-core on the CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

SUPPORT = pathlib.Path(__file__).parent
ROOT = SUPPORT.parents[1]

needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None,
    reason="megatron-core is not installed (make test-engines installs it)",
)


def cpu_environment(*, megatron: bool = True) -> dict[str, str]:
    """Variables of a process that finds this repository, and megatron-core's CPU stand-ins."""
    paths = [str(SUPPORT), str(ROOT)]
    chosen = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    if megatron:
        paths.insert(0, str(SUPPORT / "megatron_cpu"))
        chosen["MILES_TEST_MEGATRON_CPU"] = "1"
    return {**chosen, "PYTHONPATH": os.pathsep.join(paths)}


def run_python(arguments: Sequence[str], *, ranks: int = 1, megatron: bool = True, timeout_s: float = 1500) -> str:
    """Run a Python program, under torchrun for several ranks; returns its output, or fails the test with it."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
    environment = {**os.environ, **cpu_environment(megatron=megatron)}
    process = subprocess.run(
        [*command, *arguments], env=environment, cwd=ROOT, timeout=timeout_s, text=True, capture_output=True
    )
    if process.returncode:
        pytest.fail(f"{arguments} on {ranks} ranks:\n{process.stdout[-3000:]}\n{process.stderr[-6000:]}")
    return process.stdout


def run_cases(cases: Sequence[Mapping[str, Any]], out: pathlib.Path, *, ranks: int = 1, megatron: bool = True) -> None:
    """Carry out cases of `backend_cases`, all in the same processes."""
    file = out / f"cases-{cases[0]['name']}.json"
    file.write_text(json.dumps(list(cases)))
    run_python([str(SUPPORT / "backend_cases.py"), str(file), str(out)], ranks=ranks, megatron=megatron)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
