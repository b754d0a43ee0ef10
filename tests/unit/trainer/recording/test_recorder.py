"""What is left of steps: the newest recordings, and nothing of steps that were not taken or could not be written."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from recorded import random_samples, write_recording
from recorded_reference import FLAGS, recorded_in
from trainer_cases import job_config, random_groups, write_dense_model

from miles.drafts import recording_files as files
from miles.drafts.recordings import read, steps
from miles.services.trainer.backends.fsdp.backend import FsdpBackend
from miles.services.trainer.checkpoint.state import TrainerState
from miles.services.trainer.ranks.abandoning import Abandonment, StepAbandonedError

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_dense_model(tmp_path_factory.mktemp("dense"))


def loaded(model: pathlib.Path, root: pathlib.Path, **changes: Any) -> FsdpBackend:
    flags = {**FLAGS, **recorded_in(root), **changes}
    backend = FsdpBackend(job_config(model, **flags), root.parent / "checkpoints", torch.device("cpu"))
    backend.load()
    return backend


def train(backend: FsdpBackend, step: int, abandonment: Abandonment | None = None) -> dict[str, float]:
    return dict(backend.train(step, random_groups(step), lambda progress: None, abandonment))


def test_the_newest_are_kept(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    root = tmp_path / "recordings"
    backend = loaded(model, root, draft_recordings_kept=2)
    for step in range(4):
        train(backend, step)
    assert steps(root) == [2, 3]
    assert sorted(path.name for path in root.iterdir()) == ["step-00000002", "step-00000003"]


def test_tokens_are_bounded(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    root = tmp_path / "recordings"
    metrics = train(loaded(model, root, draft_tokens_per_step=50), 0)
    assert 30 < metrics["draft/recorded_tokens"] == sum(len(sample.tokens_T) for sample in read(root, 0)) <= 50


def test_a_bound_below_every_sample_is_a_warning(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    backend = loaded(model, tmp_path / "recordings", draft_tokens_per_step=2)
    assert train(backend, 0)["draft/recorded_tokens"] == 0
    assert "draft_tokens_per_step is 2; raise it" in backend.warnings[0]
    assert steps(tmp_path / "recordings") == []


def test_a_folder_that_cannot_be_written_is_a_warning(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    root = tmp_path / "recordings"
    backend = loaded(model, root)
    root.write_text("")
    metrics = train(backend, 0)
    assert metrics["train/grad_norm"] > 0
    assert metrics["draft/recorded_tokens"] == 0
    assert len(backend.warnings) == 1
    assert "step 0 was not recorded for the draft model: rank 0:" in backend.warnings[0]
    root.unlink()
    train(backend, 1)
    assert backend.warnings == ()
    assert steps(root) == [1]


def test_an_abandoned_step_leaves_nothing(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    root = tmp_path / "recordings"
    backend, abandonment = loaded(model, root), Abandonment()
    reports = 0

    def report(progress: object) -> None:
        nonlocal reports
        reports += 1
        if reports == 3:
            abandonment.request()

    with pytest.raises(StepAbandonedError):
        backend.train(0, random_groups(0), report, abandonment)
    assert reports == 3
    assert not root.exists()
    train(backend, 0)
    assert steps(root) == [0]


def test_a_skipped_update_leaves_nothing(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    root = tmp_path / "recordings"
    backend = loaded(model, root, max_nonfinite_steps=1)
    parameter = next(backend._loaded.policy.parameters())
    handle = parameter.register_hook(lambda gradient: gradient * float("nan"))
    metrics = train(backend, 0)
    handle.remove()
    assert metrics["train/skipped_steps"] == 1
    assert metrics["draft/recorded_tokens"] == 0
    assert list(root.iterdir()) == []
    train(backend, 1)
    assert steps(root) == [1]


def test_a_loaded_run_begins_without_what_it_will_record_again(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    root = tmp_path / "recordings"
    backend = loaded(model, root)
    for step in range(2):
        train(backend, step)
    state = TrainerState()
    state.finish_step({})
    backend.save(tmp_path / "checkpoints" / "step_00000001", state)
    backend.close()
    write_recording(root, 2, random_samples())
    (root / "step-00000003.partial").mkdir()
    (root / "step-00000003.partial" / files.part_name(0)).write_bytes(b"half")
    loaded(model, root)
    assert [path.name for path in root.iterdir()] == ["step-00000000"]
