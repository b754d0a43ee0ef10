"""Whole runs of the tiny dense model, to be killed in part or as a whole."""

from __future__ import annotations

import pathlib
import signal
from collections.abc import Callable

import numpy as np
import psutil
import pytest
from chaos_schedules import RECOVERIES
from rich.console import Console
from whole_runs import Run, recipe, start_run, tiny_dense

from miles.launcher.drill.drill import recovery_table
from miles.rpc import ExitCode

__all__ = ["start_run", "tiny_dense"]

Start = Callable[[list[str], pathlib.Path], Run]

SHORT: dict[str, object] = {
    "num_rollout": 8,
    "save_interval": 3,
    "rollout_batch_size": 4,
    "n_samples_per_prompt": 4,
    "max_running_requests": 16,
}
"""A run of few, short steps that saves on the way."""


def pytest_configure(config: pytest.Config) -> None:
    """Have a place for measurements."""
    config.stash[RECOVERIES] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print how long services took to come back, once all schedules have been run."""
    schedules = config.stash[RECOVERIES]
    if not schedules:
        return
    console = Console(width=120, highlight=False)
    with console.capture() as captured:
        console.print(recovery_table([recovery for schedule in schedules for recovery in schedule]))
    terminalreporter.section(f"{len(schedules)} kill schedules")
    terminalreporter.write(captured.get())


def finish(start: Start, command: list[str], run_dir: pathlib.Path) -> Run:
    """Run a command to its end, which must be a good one."""
    run = start(command, run_dir)
    assert run.wait() == ExitCode.OK, run.output()
    return run


def tiny_command(folder: pathlib.Path, run_dir: pathlib.Path, **changes: object) -> list[str]:
    """A short run of the tiny model."""
    return recipe(folder, run_dir, **{**SHORT, **changes})


def kill(*processes: psutil.Process) -> None:
    """End processes as a crash would, all at once."""
    for process in processes:
        process.send_signal(signal.SIGKILL)


def assert_same_run(one: Run, other: Run) -> None:
    """Every step once, with the same rewards, and the same final weights to the bit."""
    steps = [line["step"] for line in other.metrics()]
    assert steps == sorted(set(steps)), f"steps in metrics.jsonl: {steps}"
    assert rewards(one) == rewards(other)
    left, right = one.weights(), other.weights()
    assert left.keys() == right.keys()
    assert [name for name in left if not np.array_equal(left[name], right[name])] == []


def rewards(run: Run) -> list[float]:
    """Mean reward of each step."""
    return [line["rollout/raw_reward"] for line in run.metrics()]
