"""Loading and saving checkpoints: what is refused, what is said, and what is lost by nothing."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from trainer_cases import job_config, write_dense_model

from miles.checkpoint_folder import RECORD_FILE, NoCheckpointError, folder_name
from miles.services.trainer.backends.fsdp.backend import FsdpBackend
from miles.services.trainer.checkpoint.errors import MisfitError
from miles.services.trainer.checkpoint.state import TrainerState

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_dense_model(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def saved(model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with the checkpoints of steps 1 and 3."""
    folder = tmp_path_factory.mktemp("saved")
    write(model, folder, 1, 3)
    return folder


@pytest.fixture
def copied(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def backend(model: pathlib.Path, folder: pathlib.Path, **changes: Any) -> FsdpBackend:
    return FsdpBackend(job_config(model, **changes), folder, torch.device("cpu"))


def write(model: pathlib.Path, folder: pathlib.Path, *steps: int, **changes: Any) -> None:
    writer = backend(model, folder, **changes)
    writer.load()
    for step in steps:
        writer.save(folder / folder_name(step), TrainerState(step=step))


def without_sizes(checkpoint: pathlib.Path) -> dict[str, Any]:
    """Make the record one of version 1, which lists no files and no settings."""
    record: dict[str, Any] = json.loads((checkpoint / RECORD_FILE).read_text())
    for key in ("version", "files", "settings"):
        del record[key]
    (checkpoint / RECORD_FILE).write_text(json.dumps(record))
    return record


def cut(checkpoint: pathlib.Path) -> None:
    file = next(checkpoint.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:1000])


def test_one_step_of_several_is_loaded_when_load_names_it(
    model: pathlib.Path, saved: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    fresh = backend(model, tmp_path / "new", load=str(saved / folder_name(1)))
    assert fresh.load().step == 1
    assert fresh.loaded_from == saved / folder_name(1)
    assert not fresh.notes


def test_a_folder_without_checkpoints_is_refused_before_a_model_is_built(
    model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for load, word in ((model, "hf_checkpoint"), (tmp_path, "empty"), (tmp_path / "nowhere", "no such folder")):
        refused = backend(tmp_path / "no-model", tmp_path / "new", load=str(load))
        with pytest.raises(NoCheckpointError, match=word):
            refused.load()


def test_the_save_folder_may_hold_nothing_yet_and_that_is_said(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "all"
    fresh = backend(model, folder, load=f"{folder}/", save=str(folder))
    assert fresh.load().step == 0
    assert fresh.notes == [f"{folder} holds no checkpoint yet: starting from the initial weights"]


def test_the_own_newest_checkpoint_comes_before_load_and_that_is_said(
    model: pathlib.Path, saved: pathlib.Path, copied: pathlib.Path
) -> None:
    again = backend(model, copied, load=str(saved / folder_name(1)))
    assert again.load().step == 3
    assert "is for a first start" in again.notes[0]


def test_a_newer_damaged_checkpoint_is_passed_over_and_that_is_said(model: pathlib.Path, copied: pathlib.Path) -> None:
    cut(copied / folder_name(3))
    again = backend(model, copied)
    assert again.load().step == 1
    assert re.search(r"step_00000003: \S+ has 1000 of \d+ bytes", again.notes[0])
    shutil.rmtree(copied / folder_name(1))
    with pytest.raises(NoCheckpointError, match="none is complete"):
        again.load()


def test_whatever_a_reader_raises_names_the_checkpoint(model: pathlib.Path, copied: pathlib.Path) -> None:
    newest = copied / folder_name(3)
    without_sizes(newest)
    cut(newest)
    with pytest.raises(ValueError, match="step_00000003 cannot be read"):
        backend(model, copied).load()
    (newest / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="step_00000003 cannot be read"):
        backend(model, copied).load()
    (newest / ".metadata").unlink()
    with pytest.raises(ValueError, match="step_00000003 cannot be read"):
        backend(model, copied).load()


def test_a_checkpoint_of_version_1_loads(model: pathlib.Path, copied: pathlib.Path) -> None:
    without_sizes(copied / folder_name(3))
    again = backend(model, copied)
    assert again.load().step == 3
    assert not again.notes


def test_a_record_of_a_newer_version_is_refused(model: pathlib.Path, copied: pathlib.Path) -> None:
    path = copied / folder_name(3) / RECORD_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(ValueError, match=r"newer installation \(version 99"):
        backend(model, copied).load()


def test_without_optimizer_state_the_optimizer_starts_afresh_and_that_is_said(
    model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for name, changes in (("full", {}), ("adapter", {"lora_rank": 2, "lora_alpha": 4})):
        write(model, tmp_path / name, 2, no_save_optim=True, **changes)
        again = backend(model, tmp_path / name, **changes)
        assert again.load().step == 2
        assert "no optimizer state" in again.notes[0]


def test_another_model_is_refused_with_the_tensor_that_differs(saved: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for name, sizes, word in (
        ("wider", {"intermediate_size": 64}, "has shape"),
        ("deeper", {"layers": 4}, "it lacks model.layers.3"),
        ("shallower", {"layers": 2}, "it has model.layers.2"),
    ):
        other = write_dense_model(tmp_path / name, **sizes)  # type: ignore[arg-type]
        with pytest.raises(MisfitError, match=word):
            backend(other, saved).load()


def test_changed_settings_are_refused_or_applied_by_name(model: pathlib.Path, copied: pathlib.Path) -> None:
    with pytest.raises(MisfitError, match="lora_rank 0 → 2"):
        backend(model, copied, lora_rank=2, lora_alpha=4).load()
    again = backend(model, copied, weight_decay=0.5, lr=1e-3, save_interval=7)
    again.load()
    assert len(again.notes) == 1
    assert again.notes[0].endswith("lr 0.01 → 0.001, weight_decay 0.0 → 0.5")
    optimizer = again._loaded.roles.policy.optimizer
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5, 0.0}


def test_a_checkpoint_of_the_other_backend_is_refused_with_the_way_out(
    model: pathlib.Path, copied: pathlib.Path
) -> None:
    without_sizes(copied / folder_name(3))
    (copied / folder_name(3) / "metadata.json").write_text("{}")
    with pytest.raises(MisfitError, match="train_backend = megatron, and fsdp cannot read it"):
        backend(model, copied).load()


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of 600 kB, for root alone."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() or os.system(f"mount -t tmpfs -o size=600k tmpfs {folder} 2>/dev/null"):
        pytest.skip("only root can mount a small file system")
    yield folder
    os.system(f"umount {folder}")


def test_a_full_disk_is_named_and_costs_neither_the_older_checkpoint_nor_the_older_export(
    model: pathlib.Path, small_disk: pathlib.Path
) -> None:
    writer = backend(model, small_disk, no_save_optim=True)
    writer.load()
    old, export = small_disk / folder_name(1), small_disk / "hf"
    writer.save(old, TrainerState(step=1))
    writer.save_hf(export)
    kept = {path: path.read_bytes() for path in (*old.iterdir(), *export.iterdir())}
    (small_disk / "filler").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 50_000))
    with pytest.raises(OSError, match=f"{folder_name(2)} could not be written"):
        writer.save(small_disk / folder_name(2), TrainerState(step=2))
    with pytest.raises(OSError, match="hf could not be written") as caught:
        writer.save_hf(export)
    assert isinstance(caught.value.__cause__, Exception)
    assert os.strerror(errno.ENOSPC) in str(caught.value)
    assert {path: path.read_bytes() for path in (*old.iterdir(), *export.iterdir())} == kept
    assert not list(small_disk.glob("*.tmp"))
    assert backend(model, small_disk).load().step == 1


def test_a_model_that_was_cut_short_is_named(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    cut = pathlib.Path(shutil.copytree(model, tmp_path / "cut"))
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"the model in {re.escape(str(cut))} cannot be read .*; copy it again"):
        backend(cut, tmp_path / "checkpoints").load()
