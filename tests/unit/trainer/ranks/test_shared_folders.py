"""A folder that a host does not have, or has alone, is named."""

from __future__ import annotations

import pathlib
import socket

import pytest

from miles.services.trainer.ranks import shared_folders
from miles.services.trainer.ranks.collective_calls import Command


def seen(shared: pathlib.Path, what: str = "checkpoints", **folders: pathlib.Path) -> str:
    given = {key: str(folder) for key, folder in folders.items()}
    arguments = {"tokens": {what: str(shared / "left-by-rank-0")}, "folders": given}
    return shared_folders.look(Command(shared_folders.LOOK, arguments)).decode()


def test_a_host_that_has_everything_says_nothing(tmp_path: pathlib.Path) -> None:
    (tmp_path / "left-by-rank-0").touch()
    assert seen(tmp_path, hf_checkpoint=tmp_path) == ""


def test_a_model_that_is_not_on_every_host_is_named(tmp_path: pathlib.Path) -> None:
    missing = seen(tmp_path, ref_load=tmp_path / "model")
    assert missing.startswith(f"ref_load = {tmp_path}/model is no folder on {socket.gethostname()}")


@pytest.mark.parametrize(("what", "setting"), [("checkpoints", "save"), ("recordings", "draft_recordings_dir")])
def test_what_ranks_write_together_is_refused_in_a_folder_of_one_host(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, what: str, setting: str
) -> None:
    monkeypatch.setattr(shared_folders, "_VISIBLE_S", 0.1)
    found = seen(tmp_path, what, hf_checkpoint=tmp_path)
    assert found.startswith(f"the folder of {what} {tmp_path} on {socket.gethostname()} is not that of the trainer's")
    assert f"set {setting} (or run_dir) to a folder on storage that all nodes share" in found
