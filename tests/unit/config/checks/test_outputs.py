"""The folders that a run writes are its own."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import pytest
from config_cases import MINIMAL

from miles.config.checks.environment import file_faults
from miles.config.job import examine, resolved
from miles.ownership.owner_file import NAME, new_owner, run_of, write_owner


def faults(**changes: Any) -> dict[str, str]:
    """Faults of the settings of folders, by key."""
    found = file_faults(examine(resolved({**MINIMAL, "run_dir": "runs/x", **changes}, "cpu")).settings)
    return {f.field: f"{f.problem}; {f.remedy}" for f in found if f.field in ("run_dir", "save", "save_hf")}


def test_new_and_empty_folders_are_fine(files: pathlib.Path) -> None:
    (files / "empty").mkdir()
    assert faults(save="empty", save_hf="hf/{rollout_id}") == {}
    assert faults(save="runs/x", save_hf="runs/x/hf/{rollout_id:04d}") == {}
    assert faults(run_dir="empty", save="empty/checkpoints", save_hf="empty/checkpoints-hf") == {}


@pytest.mark.parametrize("key", ["run_dir", "save", "save_hf"])
@pytest.mark.parametrize("place", ["model", "./model/", "model/new", "link", "prompts.jsonl", "file/new", "/"])
def test_nothing_is_written_where_the_run_reads_or_where_no_folder_can_be(
    files: pathlib.Path, key: str, place: str
) -> None:
    (files / "link").symlink_to(files / "model")
    (files / "file").write_text("")
    assert key in faults(**{key: place})


@pytest.mark.parametrize("place", [".", "..", "data"])
def test_an_export_is_not_written_around_what_the_run_reads(files: pathlib.Path, place: str) -> None:
    (files / "data").mkdir()
    (files / "data" / "prompts.jsonl").write_text((files / "prompts.jsonl").read_text())
    found = faults(save_hf=place, prompt_data="data/prompts.jsonl@[0:1]")
    assert "lies in it" in found["save_hf"]


@pytest.mark.parametrize("name", ["model", "models/../model", "models/{rollout_id}"])
def test_an_export_never_takes_the_place_of_a_model_that_is_read(files: pathlib.Path, name: str) -> None:
    (files / "models").mkdir()
    os.rename(files / "model", files / "models" / "7")
    (files / "model").symlink_to("models/7")
    assert "hf_checkpoint" in faults(save_hf=name)["save_hf"]


@pytest.mark.parametrize(
    ("save", "save_hf", "wrong"),
    [
        (None, "runs/x", "save_hf"),
        (None, "runs", "save_hf"),
        (None, "runs/x/checkpoints", "save_hf"),
        (None, "runs/x/logs/hf", "save_hf"),
        ("kept", "kept", "save_hf"),
        ("kept/deep", "kept", "save_hf"),
        ("runs", None, "save"),
        ("runs/x/logs", None, "save"),
    ],
)
def test_outputs_of_a_run_do_not_take_each_others_place(
    files: pathlib.Path, save: str | None, save_hf: str | None, wrong: str
) -> None:
    assert list(faults(save=save, save_hf=save_hf)) == [wrong]


def test_what_others_wrote_is_refused_with_whose_it_is(files: pathlib.Path) -> None:
    (files / "kept").mkdir()
    write_owner(files / "kept", new_owner("checkpoints", "another", files / "elsewhere", "job-9"))
    run_of(files / "runs" / "y", "job-8")
    assert "job-9" in faults(save="kept")["save"]
    assert faults(save="kept", load="kept") == {}
    assert "job-8" in faults(save_hf="runs/y/hf")["save_hf"]
    assert "other runs are in it (y)" in faults(run_dir="runs")["run_dir"]
    (files / "kept" / NAME).write_text(json.dumps({"format": 2}))
    assert "does not say whose" in faults(save="kept")["save"]


def test_the_same_run_goes_on_in_its_folders(files: pathlib.Path) -> None:
    run = run_of(files / "runs" / "x").run
    for folder, kind in (("kept", "checkpoints"), ("hf/3", "export")):
        (files / folder).mkdir(parents=True)
        (files / folder / "config.json").write_text("{}")
        write_owner(files / folder, new_owner(kind, run, files))  # type: ignore[arg-type]
    assert faults(save="kept", save_hf="hf/{rollout_id}") == {}
