"""Which checkpoint is taken, whatever a crash left behind."""

from __future__ import annotations

import pathlib

import pytest

from miles.services.trainer.checkpoint.record import RECORD_FILE, newest
from miles.services.trainer.checkpoint.state import METRICS_KEPT, TrainerState


def write(folder: pathlib.Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir()
        (folder / name / RECORD_FILE).write_text("{}")


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ((), None),
        (("step_00000002", "step_00000010"), "step_00000010"),
        (("step_00000002", "step_00000003.tmp"), "step_00000002"),
        (("step_00000003", "step_00000003.old"), "step_00000003"),
        (("step_00000003.old", "step_00000003.tmp", "step_00000002"), "step_00000003.old"),
        (("step_99999999", "step_100000000"), "step_100000000"),
        (("step_1", "other"), None),
    ],
)
def test_the_newest_complete_checkpoint_is_found(
    tmp_path: pathlib.Path, present: tuple[str, ...], expected: str | None
) -> None:
    write(tmp_path, *present)
    (tmp_path / "step_00000077").mkdir()  # without its record
    found = newest(tmp_path)
    assert (found and found.name) == expected


def test_there_is_no_checkpoint_where_there_is_no_folder(tmp_path: pathlib.Path) -> None:
    assert newest(tmp_path / "nowhere") is None


def test_consumed_groups_are_counted_off_without_gaps() -> None:
    state = TrainerState()
    state.consume([0, 1, 4])
    assert (state.consumed_below, state.consumed_group_ids) == (2, {4})
    assert [i for i in range(6) if state.is_consumed(i)] == [0, 1, 4]
    state.consume([1, 2, 3])
    assert (state.consumed_below, state.consumed_group_ids) == (5, set())


def test_the_state_survives_json_and_keeps_the_metrics_of_the_last_steps() -> None:
    state = TrainerState()
    for step in range(METRICS_KEPT + 3):
        state.consume([2 * step])
        state.finish_step({"train/loss": 0.5 * step})
    assert min(state.metrics) == 3
    assert TrainerState.from_json(state.to_json()) == state
