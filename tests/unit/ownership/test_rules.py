"""Whether a run may write a folder."""

from __future__ import annotations

import json
import pathlib

import pytest

from miles.ownership.owner_file import new_owner, run_of, write_owner
from miles.ownership.rules import export_refusal, refusal


def model(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def run_dir(tmp_path: pathlib.Path) -> pathlib.Path:
    run_of(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("kind", ["run", "checkpoints", "export"])
def test_absent_and_empty_folders_may_be_written(tmp_path: pathlib.Path, run_dir: pathlib.Path, kind: str) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent", "absent/below"):
        assert refusal(kind, tmp_path / name, run_dir) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["run", "checkpoints", "export"])
def test_a_project_and_a_model_are_refused(tmp_path: pathlib.Path, run_dir: pathlib.Path, kind: str) -> None:
    (tmp_path / "project" / ".git").mkdir(parents=True)
    for folder in (tmp_path / "project", model(tmp_path / "model")):
        found = refusal(kind, folder, run_dir)  # type: ignore[arg-type]
        assert found is not None
        assert str(folder) in found.problem


def test_a_run_folder_may_hold_other_files_that_a_run_leaves_alone(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text("lr: 1")
    assert refusal("run", folder, folder) is None
    (folder / "metrics.jsonl").write_text("a stranger's")
    found = refusal("run", folder, folder)
    assert found is not None
    assert "write over" in found.problem


def test_a_run_folder_without_the_file_is_known_by_what_runs_leave(tmp_path: pathlib.Path) -> None:
    for name in ("run.lock", "metrics.jsonl", "summary.json"):
        (tmp_path / name).write_text("")
    (tmp_path / "logs").mkdir()
    assert refusal("run", tmp_path, tmp_path) is None


def test_a_folder_of_runs_is_no_run_folder(tmp_path: pathlib.Path) -> None:
    run_of(tmp_path / "a")
    found = refusal("run", tmp_path, tmp_path)
    assert found is not None
    assert "other runs are in it (a)" in found.problem


def test_folders_inside_of_another_runs_are_refused(tmp_path: pathlib.Path, run_dir: pathlib.Path) -> None:
    run_of(tmp_path / "other")
    for kind in ("run", "checkpoints", "export"):
        found = refusal(kind, tmp_path / "other" / "checkpoints", run_dir)  # type: ignore[arg-type]
        assert found is not None
        assert "which is the run folder of the run in" in found.problem
    assert refusal("export", run_dir / "hf" / "3", run_dir) is None


def test_checkpoints_of_another_run_are_taken_over_by_load_alone(tmp_path: pathlib.Path, run_dir: pathlib.Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    write_owner(kept, new_owner("checkpoints", "another", tmp_path / "elsewhere", "job-7"))
    found = refusal("checkpoints", kept, run_dir)
    assert found is not None
    assert "job-7" in found.problem
    assert "set load to it" in found.remedy
    assert refusal("checkpoints", kept, run_dir, str(kept)) is None
    assert refusal("checkpoints", kept, run_dir, str(kept / "step_00000003")) is None
    assert refusal("checkpoints", kept, run_dir, str(tmp_path)) is not None


def test_checkpoints_without_the_file_are_known_by_their_names(tmp_path: pathlib.Path, run_dir: pathlib.Path) -> None:
    (tmp_path / "kept" / "step_00000002").mkdir(parents=True)
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    assert refusal("checkpoints", tmp_path / "kept", run_dir) is None


def test_an_export_replaces_those_of_its_own_run_alone(tmp_path: pathlib.Path, run_dir: pathlib.Path) -> None:
    mine, other = model(tmp_path / "hf" / "1"), model(tmp_path / "hf" / "2")
    write_owner(mine, new_owner("export", run_of(run_dir).run, run_dir))
    assert export_refusal(str(mine), run_dir) is None
    found = export_refusal(f"{tmp_path}/hf/{{rollout_id}}", run_dir)
    assert found is not None
    assert str(other) in found.problem
    write_owner(other, new_owner("export", "another", tmp_path / "elsewhere"))
    found = export_refusal(f"{tmp_path}/hf/{{rollout_id}}", run_dir)
    assert found is not None
    assert "an export of the run in" in found.problem


def test_an_export_without_the_file_is_known_by_the_runs_summary(tmp_path: pathlib.Path, run_dir: pathlib.Path) -> None:
    folders = [model(tmp_path / "hf" / str(step)) for step in (1, 2)]
    pattern = f"{tmp_path}/hf/{{rollout_id}}"
    assert export_refusal(pattern, run_dir) is not None
    (run_dir / "summary.json").write_text(json.dumps({"hf_checkpoint": str(folders[1])}))
    assert export_refusal(pattern, run_dir) is None
    (folders[0] / "results").mkdir()
    assert export_refusal(pattern, run_dir) is not None


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: pathlib.Path, run_dir: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    for kind in ("run", "checkpoints", "export"):
        found = refusal(kind, tmp_path / "file", run_dir)  # type: ignore[arg-type]
        assert found is not None
        assert "is not a folder" in found.problem
