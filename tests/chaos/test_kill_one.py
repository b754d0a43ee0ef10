"""One process is killed, or all of them: the run ends with the weights of an undisturbed one."""

from __future__ import annotations

import pathlib

import psutil
import pytest
from chaos_runs import Start, assert_same_run, finish, kill, tiny_command
from whole_runs import Run

from miles.rpc import ExitCode

pytestmark = pytest.mark.chaos

VICTIMS = ("controller", "rollout-0", "reward-0", "weightsync", "trainer-0", "redis")
KILL_AFTER_STEP = 4
"""One step after a checkpoint, so that a trainer that loads it has to repeat what it did."""


@pytest.fixture
def untouched(start_run: Start, tiny_dense: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run with nothing killed; made once for all tests of this file."""
    if not _made:
        run_dir = tmp_path_factory.mktemp("untouched") / "run"
        _made.append(finish(start_run, tiny_command(tiny_dense, run_dir), run_dir))
    return _made[0]


_made: list[Run] = []


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_killed_process_changes_nothing(
    untouched: Run, start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path, victim: str
) -> None:
    run = start_run(tiny_command(tiny_dense, tmp_path / "run"), tmp_path / "run")
    run.wait_for_step(KILL_AFTER_STEP)
    kill(run.processes()[victim])
    assert run.wait() == ExitCode.OK, run.output()
    assert_same_run(untouched, run)


def test_killing_every_service_at_once_changes_nothing(
    untouched: Run, start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run = start_run(tiny_command(tiny_dense, tmp_path / "run"), tmp_path / "run")
    run.wait_for_step(KILL_AFTER_STEP)
    kill(*run.processes().values())
    assert run.wait() == ExitCode.OK, run.output()
    assert_same_run(untouched, run)


def test_killing_everything_with_the_launcher_and_running_again_changes_nothing(
    untouched: Run, start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    command, run_dir = tiny_command(tiny_dense, tmp_path / "run"), tmp_path / "run"
    run = start_run(command, run_dir)
    run.wait_for_step(KILL_AFTER_STEP)
    kill(psutil.Process(run.process.pid), *run.processes().values())
    run.process.wait()
    assert_same_run(untouched, finish(start_run, command, run_dir))
