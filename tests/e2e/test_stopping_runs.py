"""Ctrl-C: the first stops a run in order and reports it, the second kills it; there is a limit for hanging runs."""

from __future__ import annotations

import pathlib
import signal
import time
from collections.abc import Callable

import numpy as np
import pytest
from whole_runs import Run, left_of, recipe

from miles.rpc import ExitCode

Start = Callable[[list[str], pathlib.Path], Run]
LONG_STEPS = {"num_rollout": 2, "rollout_batch_size": 8, "n_samples_per_prompt": 16, "max_tokens_per_gpu": 16}
"""Each sample is a micro-batch: a step takes seconds, far longer than a signal's way."""
SHORT = {"num_rollout": 4, "rollout_batch_size": 4, "n_samples_per_prompt": 8}


@pytest.mark.slow
def test_a_step_under_way_is_abandoned_and_taken_by_the_resumed_run(
    start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    whole = start_run(recipe(tiny_dense, tmp_path / "whole", **LONG_STEPS), tmp_path / "whole")
    assert whole.wait() == ExitCode.OK, whole.output()
    command, run_dir = recipe(tiny_dense, tmp_path / "cut", **LONG_STEPS), tmp_path / "cut"
    cut = start_run(command, run_dir)
    cut.wait_for_training(1)
    cut.process.send_signal(signal.SIGINT)
    assert cut.wait(200) == ExitCode.INTERRUPTED, cut.output()
    printed = cut.log.read_text()
    assert "stopping: waiting for training step 2, which began" in printed
    assert "Ctrl-C again stops at once without saving: the one step taken is lost" in printed
    assert "stopped at step 1" in printed
    assert "step 1 was abandoned" in (run_dir / "logs" / "trainer-0.log").read_text()
    assert [path.name for path in (run_dir / "checkpoints").glob("step_*")] == ["step_00000001"]
    resumed = start_run(command, run_dir)
    assert resumed.wait() == ExitCode.OK, resumed.output()
    one, other = whole.weights(), resumed.weights()
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_second_ctrl_c_ends_a_hung_run_at_once_and_further_ones_do_no_harm(
    start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run = start_run(recipe(tiny_dense, tmp_path / "run", **SHORT), tmp_path / "run")
    run.wait_for_step(1)
    family = run.family()
    run.processes()["trainer-0"].send_signal(signal.SIGSTOP)
    run.process.send_signal(signal.SIGINT)
    run.wait_for_text("Ctrl-C again stops at once")
    time.sleep(0.2)  # a press that comes twice counts once
    began = time.monotonic()
    while run.process.poll() is None and time.monotonic() < began + 10.0:
        run.process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert run.process.poll() == ExitCode.INTERRUPTED, run.output()
    assert "stopped at once. The same command" in run.log.read_text()
    assert "Traceback" not in run.log.read_text()
    assert left_of(family) == []


@pytest.mark.slow
def test_a_step_that_hangs_is_given_up_at_the_limit(
    start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run_dir = tmp_path / "run"
    run = start_run(recipe(tiny_dense, run_dir, **LONG_STEPS, stop_timeout=2), run_dir)
    run.wait_for_training(1)
    family = run.family()
    run.processes()["trainer-0"].send_signal(signal.SIGSTOP)
    run.process.send_signal(signal.SIGINT)
    assert run.wait(120) == ExitCode.NOT_SAVED, run.output()
    printed = run.log.read_text()
    assert "s of waiting for training step 2, which began" in printed
    assert "the run ends without saving. The same command starts from the beginning; the one step taken is" in printed
    assert "Traceback" not in printed
    assert left_of(family) == []


@pytest.mark.parametrize("moment", ["imports", "services start"])
def test_ctrl_c_before_the_run_begins_leaves_nothing(
    start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path, moment: str
) -> None:
    run = start_run(recipe(tiny_dense, tmp_path / "run", **SHORT), tmp_path / "run")
    if moment == "imports":
        _wait(lambda: _has_loaded("pydantic_core", run.process.pid))
        family = []
    else:
        _wait(lambda: "controller" in run.processes())
        family = run.family()
    run.process.send_signal(signal.SIGINT)
    assert run.wait(120) in (ExitCode.INTERRUPTED, -signal.SIGINT), run.output()
    printed = run.log.read_text()
    assert "Traceback" not in printed
    assert moment == "imports" or "there is nothing to save" in printed
    assert left_of(family) == []


def _wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 200.0
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def _has_loaded(module: str, pid: int) -> bool:
    """Whether a process has loaded a module that is a shared library."""
    return module in pathlib.Path(f"/proc/{pid}/maps").read_text()
