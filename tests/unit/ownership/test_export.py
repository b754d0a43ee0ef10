"""An export replaces what exports of its run wrote, and nothing else."""

from __future__ import annotations

import pathlib
import shutil

import pytest

from miles.ownership.export import ExportFolder
from miles.ownership.owner_file import NAME, FolderTakenError, read_owner, run_of


def export(directory: pathlib.Path, run_dir: pathlib.Path, text: str, *names: str) -> None:
    folder = ExportFolder(directory, run_dir)
    folder.prepare()
    for name in names or ("config.json", "model.safetensors"):
        (folder.partial / name).write_text(text)
    folder.complete()


def contents(folder: pathlib.Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_newer_export_replaces_an_older_one_and_leaves_nothing_beside_it(tmp_path: pathlib.Path) -> None:
    place = tmp_path / "out" / "hf"
    export(place, tmp_path / "run", "old", "config.json", "model-00001-of-00002.safetensors")
    export(place, tmp_path / "run", "new")
    assert set(contents(place)) == {NAME, "config.json", "model.safetensors"}
    assert (place / "config.json").read_text() == "new"
    assert [path.name for path in place.parent.iterdir()] == ["hf"]
    owner = read_owner(place)
    assert owner is not None
    assert owner.files == ("config.json", "model.safetensors")


def test_files_that_were_put_into_an_export_are_carried_over(tmp_path: pathlib.Path) -> None:
    place, run_dir = tmp_path / "hf", tmp_path / "run"
    export(place, run_dir, "old")
    (place / "results").mkdir()
    (place / "results" / "math.json").write_text("0.5")
    (place / "notes.txt").write_text("keep me")
    export(place, run_dir, "new")
    assert contents(place)["results/math.json"] == "0.5"
    assert contents(place)["notes.txt"] == "keep me"
    assert contents(place)["config.json"] == "new"


@pytest.mark.parametrize("moved", [False, True])
def test_an_interrupted_exchange_is_finished_by_the_next_export(tmp_path: pathlib.Path, moved: bool) -> None:
    place, run_dir = tmp_path / "hf", tmp_path / "run"
    export(place, run_dir, "old")
    (place / "notes.txt").write_text("keep me")
    folder = ExportFolder(place, run_dir)
    folder.prepare()
    (folder.partial / "config.json").write_text("half")
    place.rename(tmp_path / ".hf.miles-old")  # and here the process was killed
    if moved:
        folder.partial.rename(place)
    export(place, run_dir, "new")
    assert contents(place)["notes.txt"] == "keep me"
    assert contents(place)["config.json"] == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def test_other_folders_are_refused_and_stay_as_they_are(tmp_path: pathlib.Path) -> None:
    place = tmp_path / "hf"
    (place / "other-model").mkdir(parents=True)
    (place / "notes.txt").write_text("keep me")
    with pytest.raises(FolderTakenError, match="other files are in it"):
        export(place, tmp_path / "run", "new")
    export(tmp_path / "second", tmp_path / "run-2", "theirs")
    with pytest.raises(FolderTakenError, match="an export of the run in"):
        export(tmp_path / "second", tmp_path / "run", "new")
    assert contents(place) == {"notes.txt": "keep me"}
    assert contents(tmp_path / "second")["config.json"] == "theirs"


def test_an_empty_folder_inside_of_another_run_is_refused_too(tmp_path: pathlib.Path) -> None:
    run_of(tmp_path / "other")
    (tmp_path / "other" / "hf").mkdir()
    with pytest.raises(FolderTakenError, match="it lies in"):
        export(tmp_path / "other" / "hf", tmp_path / "run", "new")


def test_what_lies_where_the_export_is_written_is_not_deleted(tmp_path: pathlib.Path) -> None:
    beside = tmp_path / ".hf.miles-partial"
    beside.mkdir()
    (beside / "notes.txt").write_text("keep me")
    with pytest.raises(FolderTakenError, match="was not made by this run"):
        export(tmp_path / "hf", tmp_path / "run", "new")
    assert contents(beside) == {"notes.txt": "keep me"}


def test_an_export_through_a_link_is_written_to_the_folder_it_leads_to(tmp_path: pathlib.Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "hf").symlink_to(tmp_path / "disk")
    export(tmp_path / "hf", tmp_path / "run", "new")
    assert (tmp_path / "hf").is_symlink()
    assert contents(tmp_path / "disk")["config.json"] == "new"


def test_an_export_never_marks_the_run_folder_again_even_if_it_looks_like_a_copy(tmp_path: pathlib.Path) -> None:
    run = run_of(tmp_path / "run")
    export(tmp_path / "hf", tmp_path / "run", "old")
    shutil.copytree(tmp_path / "run", tmp_path / "mounted")
    export(tmp_path / "hf", tmp_path / "mounted", "new")
    assert read_owner(tmp_path / "mounted") == run
    assert contents(tmp_path / "hf")["config.json"] == "new"
