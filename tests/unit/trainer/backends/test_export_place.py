"""Where a trainer writes its exports."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from miles.ownership.export import ExportFolder
from miles.ownership.owner_file import FolderTakenError
from miles.services.trainer.backends.base import replace_export


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_nothing_is_written_when_the_place_is_not_the_runs(tmp_path: pathlib.Path) -> None:
    place = tmp_path / "hf"
    place.mkdir()
    (place / "notes.txt").write_text("keep me")
    written: list[pathlib.Path] = []
    with pytest.raises(FolderTakenError, match=r"the export is not written: .*notes\.txt"):
        replace_export(ExportFolder(place, tmp_path / "run"), written.append)
    assert written == []
    assert (place / "notes.txt").read_text() == "keep me"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


@pytest.mark.usefixtures("one_rank")
def test_an_export_that_fails_leaves_the_one_before(tmp_path: pathlib.Path) -> None:
    def write(folder: pathlib.Path) -> None:
        (folder / "config.json").write_text("first")

    def fail(folder: pathlib.Path) -> None:
        (folder / "config.json").write_text("half")
        raise OSError("the disk is full")

    replace_export(ExportFolder(tmp_path / "hf", tmp_path / "run"), write)
    with pytest.raises(OSError, match="full"):
        replace_export(ExportFolder(tmp_path / "hf", tmp_path / "run"), fail)
    assert (tmp_path / "hf" / "config.json").read_text() == "first"
    replace_export(ExportFolder(tmp_path / "hf", tmp_path / "run"), write)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]
