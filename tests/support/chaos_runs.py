"""Whole runs of the tiny dense model whose processes are killed, and what must hold of them."""

from __future__ import annotations

import pathlib
import signal
from collections.abc import Callable

import numpy as np
import psutil
from whole_runs import Run, recipe

from miles.rpc import ExitCode

Start = Callable[[list[str], pathlib.Path], Run]

SHORT: dict[str, object] = {
    "num_rollout": 8,
    "save_interval": 3,
    "rollout_batch_size": 4,
    "n_samples_per_prompt": 4,
    "max_running_requests": 16,
}
"""Settings of a run of few, short steps that saves checkpoints."""


def finish(start: Start, command: list[str], run_dir: pathlib.Path) -> Run:
    """Run a command to its end, and assert that it succeeds."""
    run = start(command, run_dir)
    assert run.wait() == ExitCode.OK, run.output()
    return run


def tiny_command(folder: pathlib.Path, run_dir: pathlib.Path, **changes: object) -> list[str]:
    """Return the command of a short run of the tiny model."""
    return recipe(folder, run_dir, **{**SHORT, **changes})


def kill(*processes: psutil.Process) -> None:
    """Kill processes as a crash would, all at once."""
    for process in processes:
        process.send_signal(signal.SIGKILL)


def assert_same_run(one: Run, other: Run) -> None:
    """Assert that the other run has every step once, the same rewards, and bit-identical final weights."""
    steps = [line["step"] for line in other.metrics()]
    assert steps == sorted(set(steps)), f"steps in metrics.jsonl: {steps}"
    assert rewards(one) == rewards(other)
    left, right = one.weights(), other.weights()
    assert left.keys() == right.keys()
    assert [name for name in left if not np.array_equal(left[name], right[name])] == []


def rewards(run: Run) -> list[float]:
    """Return the mean reward of each step."""
    return [line["rollout/raw_reward"] for line in run.metrics()]
