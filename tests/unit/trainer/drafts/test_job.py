from __future__ import annotations

import pathlib
import threading

import pytest
import torch
from draft_trainer_process import draft_config, record
from trainer_cases import write_dense_model

from miles.drafts.initial import ensure_initial
from miles.services.trainer.drafts.job import DraftJob
from miles.services.trainer.drafts.learner import create_learner

DEADLINE_S = 60.0
NOBODY = "127.0.0.1:1"
"""Address of a weight-sync service that is not needed before the first version."""


def test_who_stops_a_job_is_told_that_its_last_save_failed(tmp_path: pathlib.Path) -> None:
    config = draft_config(write_dense_model(tmp_path / "model"), draft_update_interval=6)
    run_dir, device = pathlib.Path(config.services.run_dir), torch.device("cpu")
    ensure_initial(config)
    record(run_dir, 0)
    learner = create_learner(config, pathlib.Path(config.rollout.sglang_args["speculative_draft_model_path"]), device)
    changed = threading.Event()
    job = DraftJob("job", config, run_dir, NOBODY, learner, device, 0, changed.set)
    job.begin()
    while not job.progress.recordings:
        assert changed.wait(DEADLINE_S)
        changed.clear()
    job.hold(release_memory=False)
    with torch.no_grad():
        next(iter(learner.state().values())).view(-1)[0] = float("nan")
    with pytest.raises(RuntimeError, match=r"has learned last is lost: DraftBrokenError: .* no finite numbers"):
        job.close(DEADLINE_S)
    assert job.failure is None, "it has ended because it was asked to"
