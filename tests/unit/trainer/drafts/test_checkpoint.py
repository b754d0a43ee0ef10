from __future__ import annotations

import pathlib

import pytest
import torch

from miles.services.trainer.drafts import checkpoint

RECORD = checkpoint.DraftRecord("eagle3", "head", 3, 11, 9, 2, {"draft/loss": 0.5})


def test_a_checkpoint_replaces_the_one_before_as_a_whole(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "checkpoint"
    assert checkpoint.load(folder) is None
    checkpoint.save(folder, checkpoint.DraftRecord("eagle3", "head", 2, 10, 8, 2), {"a": torch.zeros(2)})
    checkpoint.save(folder, RECORD, {"a": torch.arange(6.0).view(2, 3), "steps": torch.tensor(7)})
    found = checkpoint.load(folder)
    assert found is not None
    record, state = found
    assert record == RECORD
    assert state["a"].equal(torch.arange(6.0).view(2, 3))
    assert int(state["steps"]) == 7
    assert [path.name for path in folder.iterdir()] == [checkpoint.FILE]


def test_one_that_was_being_written_does_not_count(tmp_path: pathlib.Path) -> None:
    checkpoint.save(tmp_path, RECORD, {"a": torch.zeros(2)})
    (tmp_path / f"{checkpoint.FILE}.tmp").write_bytes(b"half")
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert found[0] == RECORD


@pytest.mark.parametrize("content", [b"", b"no safetensors", None], ids=["empty", "other", "no record"])
def test_a_damaged_one_is_named_with_the_way_out(tmp_path: pathlib.Path, content: bytes | None) -> None:
    from safetensors.torch import save_file

    path = tmp_path / checkpoint.FILE
    if content is None:
        save_file({"a": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(checkpoint.UnusableDraftCheckpointError, match="remove it to begin again") as refused:
        checkpoint.load(tmp_path)
    assert str(path) in str(refused.value)


def test_the_newest_number_is_noted_and_a_damaged_note_is_named(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "checkpoint"
    assert checkpoint.noted_version(folder) == 0
    for version in (9, 10):
        checkpoint.note_version(folder, version)
    assert checkpoint.noted_version(folder) == 10
    (folder / checkpoint.NOTED).write_text("")
    with pytest.raises(checkpoint.UnusableDraftCheckpointError, match="not the number of a version"):
        checkpoint.noted_version(folder)
