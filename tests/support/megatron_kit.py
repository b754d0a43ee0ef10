"""Starting processes that run megatron-core on the CPU."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

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


class Forking:
    """A process that forks the processes of programs; those need not import what it has imported."""

    def __init__(self, *, megatron: bool) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SUPPORT / "forked_ranks.py")],
            env={**os.environ, **cpu_environment(megatron=megatron)},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, request: Mapping[str, Any], timeout_s: float) -> int:
        """The exit code; `forked_ranks` describes requests. Nothing is left running when it does not end in time."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], timeout_s)[0]:
                raise TimeoutError(f"{request['arguments']} did not end within {timeout_s} s")
            return int(self._process.stdout.readline())
        except BaseException:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            forking.cache_clear()
            raise


@functools.cache
def forking(*, megatron: bool) -> Forking:
    """The process of this test process; it ends when its standard input does."""
    return Forking(megatron=megatron)


def run_python(arguments: Sequence[str], *, ranks: int = 1, megatron: bool = True, timeout_s: float = 1500) -> str:
    """Run a Python program on so many ranks; returns what they printed, or fails the test with it.

    On the CPU they are forks. With a GPU they are started on their own, by torchrun where there are several.
    """
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = (pathlib.Path(folder) / name for name in ("stdout", "stderr"))
        for file in (stdout, stderr):
            file.touch()
        if torch.cuda.is_available():
            torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", free_port()]
            command = [sys.executable, *(map(str, torchrun) if ranks > 1 else ()), *arguments]
            environment = {**os.environ, **cpu_environment(megatron=megatron)}
            with stdout.open("w") as out, stderr.open("w") as err:
                code = subprocess.run(
                    command, env=environment, cwd=ROOT, timeout=timeout_s, stdout=out, stderr=err
                ).returncode
        else:
            request = {"arguments": list(arguments), "ranks": ranks, "port": free_port()}
            code = forking(megatron=megatron).run(request | {"stdout": str(stdout), "stderr": str(stderr)}, timeout_s)
        said = stdout.read_text()
        if code:
            pytest.fail(f"{arguments} on {ranks} ranks:\n{said[-3000:]}\n{stderr.read_text()[-6000:]}")
    return said


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
