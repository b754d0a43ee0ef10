"""The file that says whose a folder is."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from miles.ownership.owner_file import (
    NAME,
    FolderTakenError,
    mark_services,
    new_owner,
    read_owner,
    run_of,
    write_owner,
)


def test_the_same_run_folder_is_the_same_run_even_when_it_has_moved(tmp_path: pathlib.Path) -> None:
    first = run_of(tmp_path / "run", "job-1")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert run_of(tmp_path / "moved", "job-2") == first
    assert first.job_id == "job-1"
    assert "" not in (first.host, first.since)


def test_a_copy_of_a_run_folder_is_another_run(tmp_path: pathlib.Path) -> None:
    first = run_of(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    copy = run_of(tmp_path / "copy")
    assert copy.run != first.run
    assert run_of(tmp_path / "copy") == copy
    assert run_of(tmp_path / "run") == first


def test_the_first_of_many_writers_owns_a_folder(tmp_path: pathlib.Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        owners = set(pool.map(lambda _: run_of(tmp_path).run, range(16)))
    assert len(owners) == 1
    assert os.listdir(tmp_path) == [NAME]


def test_a_file_that_exists_is_kept(tmp_path: pathlib.Path) -> None:
    first = write_owner(tmp_path, new_owner("run", "a", tmp_path))
    assert write_owner(tmp_path, new_owner("run", "b", tmp_path)) == first == read_owner(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": 99}', '{"format": 1, "kind": "x", "run": "", "run_dir": ""}', "\0"]
)
def test_a_file_that_cannot_be_read_keeps_the_folder_from_everybody(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(FolderTakenError, match="delete that file if it is yours"):
        read_owner(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_a_folder_in_its_place_is_not_waited_for(tmp_path: pathlib.Path, make: object) -> None:
    make(tmp_path / NAME)  # type: ignore[operator]
    with pytest.raises(FolderTakenError):
        read_owner(tmp_path)


def test_a_later_version_may_add_fields(tmp_path: pathlib.Path) -> None:
    owner = write_owner(tmp_path, new_owner("run", "a", tmp_path))
    data = json.loads((tmp_path / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps(data | {"new": 1}))
    assert read_owner(tmp_path) == owner


def test_no_job_takes_the_folder_of_services(tmp_path: pathlib.Path) -> None:
    mark_services(tmp_path)
    with pytest.raises(FolderTakenError, match="services that run jobs"):
        run_of(tmp_path)
    mark_services(tmp_path)
