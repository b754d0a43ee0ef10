"""Which checkpoint is taken, whatever a crash or a copy left behind, and what a folder without one is called."""

from __future__ import annotations

import json
import pathlib

import pytest

from miles.checkpoint_folder import (
    LATEST_FILE,
    RECORD_FILE,
    NoCheckpointError,
    newest,
    same_folder,
    step_of,
    to_load,
)


def write(folder: pathlib.Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "data.bin").write_bytes(b"1234")
        (folder / name / RECORD_FILE).write_text(json.dumps({"files": {"data.bin": 4}}))


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ((), None),
        (("step_00000002", "step_00000010"), "step_00000010"),
        (("step_00000002", "step_00000003.tmp"), "step_00000002"),
        (("step_00000003", "step_00000003.old"), "step_00000003"),
        (("step_00000003.old", "step_00000003.tmp", "step_00000002"), "step_00000003.old"),
        (("step_99999999", "step_100000000"), "step_100000000"),
        (("step_1", "other"), None),
    ],
)
def test_the_newest_complete_checkpoint_is_found(
    tmp_path: pathlib.Path, present: tuple[str, ...], expected: str | None
) -> None:
    write(tmp_path, *present)
    found = newest(tmp_path)
    assert (found.checkpoint and found.checkpoint.name) == expected
    assert not found.damaged


def test_there_is_no_checkpoint_where_there_is_no_folder(tmp_path: pathlib.Path) -> None:
    assert newest(tmp_path / "nowhere").checkpoint is None


def cut_short(step: pathlib.Path) -> None:
    (step / "data.bin").write_bytes(b"12")


def without_a_file(step: pathlib.Path) -> None:
    (step / "data.bin").unlink()


def without_record(step: pathlib.Path) -> None:
    (step / RECORD_FILE).unlink()


def with_half_a_record(step: pathlib.Path) -> None:
    (step / RECORD_FILE).write_text("{")


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (cut_short, "data.bin has 2 of 4 bytes"),
        (without_a_file, "data.bin is missing"),
        (without_record, "trainer.json is missing"),
        (with_half_a_record, "not JSON"),
    ],
)
def test_a_damaged_newest_checkpoint_is_passed_over_with_the_reason(
    tmp_path: pathlib.Path, damage: object, word: str
) -> None:
    write(tmp_path, "step_00000002", "step_00000005")
    damage(tmp_path / "step_00000005")  # type: ignore[operator]
    found = newest(tmp_path)
    assert found.checkpoint == tmp_path / "step_00000002"
    assert [path.name for path, _ in found.damaged] == ["step_00000005"]
    assert word in found.words()
    assert word in str(refused(tmp_path / "step_00000005"))
    damage(tmp_path / "step_00000002")  # type: ignore[operator]
    assert "none is complete" in str(refused(tmp_path))


def test_a_marker_of_a_step_that_is_gone_is_said(tmp_path: pathlib.Path) -> None:
    write(tmp_path, "step_00000002")
    (tmp_path / LATEST_FILE).write_text("step_00000005\n")
    assert "latest names it, but it is not there" in newest(tmp_path).words()
    (tmp_path / LATEST_FILE).write_text("step_00000001\n")  # a crash came between the two
    assert not newest(tmp_path).passed_over


def refused(load: pathlib.Path) -> NoCheckpointError:
    with pytest.raises(NoCheckpointError) as caught:
        to_load(load)
    assert str(load) in str(caught.value)
    return caught.value


def test_a_checkpoint_may_be_named_itself_however_its_path_is_written(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "run", "step_00000002", "step_00000005")
    step = tmp_path / "run" / "step_00000002"
    (tmp_path / "link").symlink_to(step)
    (tmp_path / "all").symlink_to(tmp_path / "run")
    step_under_another_name = tmp_path / "good one"
    write(tmp_path, "good one")
    monkeypatch.chdir(tmp_path / "run")
    for load in (step, tmp_path / "link", pathlib.Path("step_00000002"), step_under_another_name):
        assert to_load(load).checkpoint == load
    for load in (pathlib.Path("../run/"), tmp_path / "all"):
        found = to_load(load).checkpoint
        assert found is not None
        assert found.resolve() == tmp_path / "run" / "step_00000005"


def test_a_path_that_is_no_checkpoint_is_refused_with_what_would_do(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "run" / "checkpoints", "step_00000005")
    assert refused(tmp_path / "run").remedy == f"give {tmp_path / 'run' / 'checkpoints'}"
    (tmp_path / "file").write_text("")
    assert refused(tmp_path / "file").problem == "it is a file"
    assert refused(tmp_path / "nowhere").problem == "there is no such folder"
    for name, file, word in (
        ("empty", None, "empty"),
        ("model", "config.json", "hf_checkpoint"),
        ("adapter", "adapter_config.json", "lora_adapter_path"),
        ("megatron", "latest_checkpointed_iteration.txt", "Megatron-LM"),
        ("tensors", ".metadata", "no trainer.json"),
        ("else", "notes.txt", "step_"),
    ):
        (tmp_path / name).mkdir()
        if file is not None:
            (tmp_path / name / file).write_text("{}")
        assert word in str(refused(tmp_path / name))


def test_names_and_folders_are_compared(tmp_path: pathlib.Path) -> None:
    assert step_of("x/step_00000012") == 12
    assert step_of("x/step_00000012.tmp") is None
    assert step_of("x/12") is None
    assert same_folder(tmp_path / "a" / ".." / "b", tmp_path / "b")
    assert not same_folder(tmp_path / "a", tmp_path / "b")
