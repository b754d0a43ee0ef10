from __future__ import annotations

import json
import pathlib

import pytest

from miles.checkpoint_folder import folder_name
from miles.services.trainer.checkpoint.retention import discard_passed


def write(folder: pathlib.Path, step: int, *, complete: bool = True) -> None:
    checkpoint = folder / folder_name(step)
    checkpoint.mkdir(parents=True)
    (checkpoint / "tensors").write_bytes(b"1234")
    if complete:
        (checkpoint / "trainer.json").write_text(json.dumps({"files": {"tensors": 4}}))


def left(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_so_many_are_kept_and_the_newest(tmp_path: pathlib.Path) -> None:
    for step in (0, 2, 4, 6, 8, 9):
        write(tmp_path, step)
    (tmp_path / "other").mkdir()
    assert [path.name for path in discard_passed(tmp_path, 4)] == [folder_name(2), folder_name(6)]
    assert left(tmp_path) == ["other", *map(folder_name, (0, 4, 8, 9))]
    assert discard_passed(tmp_path, 4) == []


def test_newer_ones_than_the_newest_complete_one_are_left(tmp_path: pathlib.Path) -> None:
    write(tmp_path, 2)
    write(tmp_path, 3)
    write(tmp_path, 5, complete=False)
    discard_passed(tmp_path, 4)
    assert left(tmp_path) == [folder_name(3), folder_name(5)]


def test_nothing_goes_where_no_checkpoint_is_complete(tmp_path: pathlib.Path) -> None:
    write(tmp_path, 2, complete=False)
    write(tmp_path, 3, complete=False)
    assert discard_passed(tmp_path, 4) == []
    assert left(tmp_path) == [folder_name(2), folder_name(3)]


def test_what_a_crash_left_half_deleted_goes_the_next_time(tmp_path: pathlib.Path) -> None:
    write(tmp_path, 4)
    (tmp_path / f"{folder_name(2)}.deleted").mkdir()
    discard_passed(tmp_path, 4)
    assert left(tmp_path) == [folder_name(4)]


def test_what_is_deleted_is_logged(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    with caplog.at_level("INFO"):
        discard_passed(tmp_path, 4)
    assert "deleted step_00000001" in caplog.text
    assert "step_00000002 is complete" in caplog.text
