from __future__ import annotations

import pathlib
import threading

import torch
from draft_trainer_process import draft_config, record
from trainer_cases import write_dense_model

from miles.drafts.initial import ensure_initial
from miles.services.trainer.drafts.job import DraftJob
from miles.services.trainer.drafts.learner import create_learner
from miles.services.trainer.drafts.progress import DraftProgress

DEADLINE_S = 200.0
CPU = torch.device("cpu")


def test_what_was_trained_on_before_a_reload_is_not_told_as_of_the_policy_after_it(tmp_path: pathlib.Path) -> None:
    config = draft_config(write_dense_model(tmp_path / "model"), draft_update_interval=100)
    run_dir = pathlib.Path(config.services.run_dir)
    ensure_initial(config)
    learner = create_learner(config, pathlib.Path(config.rollout.sglang_args["speculative_draft_model_path"]), CPU)
    after: list[DraftProgress] = []
    done = threading.Event()

    def on_change() -> None:
        """Called by the job's thread, so that the policy is taken back in the middle of a recording."""
        if after:
            after.append(job.progress)
            if job.progress.recorded_step == 2:
                done.set()
        elif job.progress.activity == "training on step 2":
            assert job.progress.recorded_step == 1
            job.reload(0)
            after.append(job.progress)

    job = DraftJob("job", config, run_dir, "127.0.0.1:1", learner, CPU, 0, on_change)
    for step in range(3):
        record(run_dir, step)
    job.begin()
    assert done.wait(DEADLINE_S)
    job.close(DEADLINE_S)
    assert job.failure is None
    told = [progress.recorded_step for progress in after if progress.recorded_step is not None]
    assert told[0] == 0, "the recordings that are made again are told from the first"
    assert after[0].recorded_step is None
