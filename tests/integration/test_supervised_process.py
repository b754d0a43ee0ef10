"""Supervised processes: restart, giving up, stopping, and the end of the supervisor itself."""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal
import subprocess
import sys
import time

import psutil
import pytest

from miles.launcher.process import ProcessFailedError, SupervisedProcess
from miles.launcher.restart_policy import RestartPolicy
from miles.rpc import ExitCode
from miles.rpc.server import WATCHED_PID_ENVIRONMENT


def supervised(tmp_path: pathlib.Path, code: str) -> SupervisedProcess:
    policy = RestartPolicy(limit=3, first_delay_s=0.01, max_delay_s=0.01)
    return SupervisedProcess("child", [sys.executable, "-c", code], dict(os.environ), tmp_path / "child.log", policy)


async def until(condition: object, what: str, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        await asyncio.sleep(0.02)


async def test_a_killed_process_is_started_again(tmp_path: pathlib.Path) -> None:
    process = supervised(tmp_path, "import time; time.sleep(60)")
    running = asyncio.create_task(process.run())
    await until(lambda: process.pid is not None, "the first start")
    first = process.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await until(lambda: process.pid not in (None, first), "the second start")
    await process.stop(5.0)
    await running
    assert process.restarts == 1


async def test_a_process_that_keeps_ending_is_given_up_with_the_end_of_its_log(tmp_path: pathlib.Path) -> None:
    process = supervised(tmp_path, "print('my last words', flush=True); raise SystemExit(7)")
    with pytest.raises(ProcessFailedError, match=r"exit code 7(.|\n)*my last words"):
        await process.run()
    assert process.restarts == 3


async def test_a_hopeless_cause_is_not_tried_again(tmp_path: pathlib.Path) -> None:
    process = supervised(tmp_path, f"raise SystemExit({int(ExitCode.PORT_IN_USE)})")
    with pytest.raises(ProcessFailedError, match="choose another"):
        await process.run()
    assert process.restarts == 0


async def test_one_that_ignores_sigterm_is_killed_with_its_children(tmp_path: pathlib.Path) -> None:
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = supervised(tmp_path, code)
    running = asyncio.create_task(process.run())
    await until(lambda: process.log_path.exists() and process.log_path.read_text().strip(), "the grandchild")
    grandchild = int(process.log_path.read_text())
    await process.stop(0.2)
    await running
    await until(lambda: not alive(grandchild), "the end of the grandchild")


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


async def test_a_service_ends_when_the_process_that_started_it_is_killed(tmp_path: pathlib.Path) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with (tmp_path / "service.log").open("wb") as log:
        service = subprocess.Popen(
            [sys.executable, "-m", "miles.services.reward", "--listen", "127.0.0.1:0", "--rewards", "exact_match"],
            env={**os.environ, WATCHED_PID_ENVIRONMENT: str(launcher.pid)},
            stdout=log,
            stderr=log,
        )
    try:
        await asyncio.sleep(2.0)
        assert service.poll() is None, (tmp_path / "service.log").read_text()
        launcher.kill()
        launcher.wait()
        await until(lambda: service.poll() is not None, "the service to end")
        assert service.returncode == 0
    finally:
        launcher.kill()
        service.kill()
        launcher.wait()
        service.wait()
