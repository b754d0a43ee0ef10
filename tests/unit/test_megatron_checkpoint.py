from __future__ import annotations

import pathlib

import pytest

from miles.checkpoint_folder import NoCheckpointError
from miles.megatron_checkpoint import is_foreign, tensors_of


def write(folder: pathlib.Path, *names: str) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("metadata.json", ".metadata", *names):
        (folder / name).write_text("{}")
    return folder


def test_the_tracker_names_the_newest_and_a_step_another(tmp_path: pathlib.Path) -> None:
    saved = [write(tmp_path / name) for name in ("release", "iter_0000100", "iter_0000200")]
    for text, expected in (("release", saved[0]), ("200\n", saved[2])):
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
        assert tensors_of(tmp_path) == expected
    assert tensors_of(tmp_path, 100) == saved[1]
    assert tensors_of(saved[1]) == saved[1]
    assert is_foreign(tmp_path)
    assert is_foreign(saved[0])


def test_checkpoints_of_the_megatron_backend_are_torch_dist_too(tmp_path: pathlib.Path) -> None:
    step = write(tmp_path / "step_00000003", "trainer.json")
    assert tensors_of(tmp_path) == tensors_of(step) == step
    assert not is_foreign(tmp_path)
    assert not is_foreign(step)


def test_other_folders_are_none(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    fsdp = tmp_path / "fsdp" / "step_00000003"
    fsdp.mkdir(parents=True)
    for name in ("trainer.json", ".metadata"):
        (fsdp / name).write_text("{}")
    assert tensors_of(tmp_path) is tensors_of(tmp_path / "gone") is tensors_of(fsdp.parent) is None
    assert not any(map(is_foreign, (tmp_path, tmp_path / "gone", fsdp)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("release", "there are no torch_dist files in release"),
        ("300", "iter_0000300 is in Megatron-LM's older format"),
        ("../x", "its latest_checkpointed_iteration.txt says '../x'"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: pathlib.Path, text: str, expected: str) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    (tmp_path / "iter_0000300" / "mp_rank_00").mkdir(parents=True)
    with pytest.raises(NoCheckpointError, match=expected.replace(".", r"\.")):
        tensors_of(tmp_path)
