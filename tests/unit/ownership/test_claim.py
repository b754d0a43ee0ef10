"""A run holds its folders while it runs."""

from __future__ import annotations

import pathlib

import pytest

from miles.ownership.claim import claimed
from miles.ownership.owner_file import FolderTakenError, read_owner, run_of


def test_a_run_folder_is_held_by_one_at_a_time(tmp_path: pathlib.Path) -> None:
    run_dir = str(tmp_path / "run")
    first, second = claimed(run_dir, None, None, None, "a"), claimed(f"{run_dir}/../run/", None, None, None, "b")
    with first, pytest.raises(FolderTakenError, match="another controller runs a job in it now"):
        second.__enter__()
    with claimed(run_dir, None, None, None, "b"):
        assert run_of(tmp_path / "run").job_id == "a"


def test_checkpoints_are_marked_and_given_to_a_run_that_loads_them(tmp_path: pathlib.Path) -> None:
    save = tmp_path / "kept"
    with claimed(str(tmp_path / "one"), str(save), None, None, "a"):
        with pytest.raises(FolderTakenError, match="now"):
            claimed(str(tmp_path / "two"), str(save), None, str(save), "b").__enter__()
        assert read_owner(save) is not None
    with pytest.raises(FolderTakenError, match="set load to it"):
        claimed(str(tmp_path / "two"), str(save), None, None, "b").__enter__()
    with claimed(str(tmp_path / "two"), str(save), None, str(save), "b"):
        owner = read_owner(save)
        assert owner is not None
        assert owner.run == run_of(tmp_path / "two").run
    with pytest.raises(FolderTakenError, match="two"):
        claimed(str(tmp_path / "one"), str(save), None, None, "a").__enter__()


def test_the_place_of_exports_is_looked_at_before_the_run(tmp_path: pathlib.Path) -> None:
    (tmp_path / "hf" / "4").mkdir(parents=True)
    (tmp_path / "hf" / "4" / "thesis.tex").write_text("")
    with pytest.raises(FolderTakenError, match=r"save_hf: .*thesis\.tex"):
        claimed(str(tmp_path / "run"), None, f"{tmp_path}/hf/{{rollout_id}}", None, "a").__enter__()


def test_a_save_folder_that_is_the_run_folder_is_held_once(tmp_path: pathlib.Path) -> None:
    with claimed(str(tmp_path), str(tmp_path), None, None, "a"):
        pass
