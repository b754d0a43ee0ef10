"""Where a run goes on from, and whether anything is left to do there."""

from __future__ import annotations

import pathlib

from miles.rpc.gen import trainer_pb2
from miles.services.controller.run.resume import nothing_is_left


def ready(folder: pathlib.Path, step: int, loaded_step: int) -> trainer_pb2.TrainerReady:
    return trainer_pb2.TrainerReady(step=step, loaded_step=loaded_step, checkpoint_dir=str(folder / "step_00000003"))


def test_a_run_that_took_its_steps_from_another_runs_checkpoint_still_ends_after_a_loss(tmp_path: pathlib.Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    assert not nothing_is_left(ready(other, 5, 3), 5, own)


def test_a_run_that_begins_at_or_beyond_its_end_has_nothing_left(tmp_path: pathlib.Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    assert nothing_is_left(ready(other, 3, 3), 3, own)
    assert not nothing_is_left(ready(own, 3, 3), 3, own)
    assert nothing_is_left(ready(own, 3, 3), 2, own)
    assert not nothing_is_left(ready(other, 3, 3), 4, own)


def test_a_run_of_no_steps_evaluates_what_it_loads(tmp_path: pathlib.Path) -> None:
    assert not nothing_is_left(ready(tmp_path / "other", 3, 3), 0, tmp_path / "own")
