"""A training step that is left before its first optimizer step has changed nothing."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from trainer_cases import job_config, random_groups, write_dense_model

from miles.services.trainer.backends.fsdp.backend import FsdpBackend
from miles.services.trainer.checkpoint.state import TrainerState
from miles.services.trainer.ranks.abandoning import Abandonment, StepAbandonedError
from miles.services.trainer.step.progress import Progress

CASES: dict[str, dict[str, Any]] = {
    "reference": {"use_kl_loss": True, "kl_loss_coef": 0.1},
    "critic": {"advantage_estimator": "ppo", "critic_lr": 0.02, "num_steps_per_rollout": 2},
    "old policies": {"keep_old_actor": True, "max_weight_staleness": 1},
}


def test_a_step_can_be_left_until_it_is_committed_to() -> None:
    asked = Abandonment()
    asked.check()
    assert asked.request()
    with pytest.raises(StepAbandonedError):
        asked.check()
    with pytest.raises(StepAbandonedError):
        asked.commit()
    late = Abandonment()
    late.commit()
    assert not late.request()
    late.check()


def test_ranks_do_what_rank_0_says() -> None:
    said = []

    def share(wanted: bool) -> bool:
        said.append(wanted)
        return True

    other = Abandonment(share)
    with pytest.raises(StepAbandonedError):
        other.check()
    with pytest.raises(StepAbandonedError):
        other.commit()
    assert said == [False, False]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_dense_model(tmp_path_factory.mktemp("dense"))


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".distcp"}


def leave_at(backend: FsdpBackend, number: int, step: int) -> list[str]:
    """Begin a step and ask at one of its reports to leave it; returns the phases up to then."""
    abandonment, phases = Abandonment(), []

    def report(progress: Progress) -> None:
        phases.append(progress.phase)
        if len(phases) == number + 1:
            assert abandonment.request()

    with pytest.raises(StepAbandonedError):
        backend.train(step, random_groups(step), report, abandonment)
    return phases


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_after_an_abandoned_step_is_what_was_before_it(
    dense: pathlib.Path, tmp_path: pathlib.Path, case: str
) -> None:
    backend = FsdpBackend(job_config(dense, **CASES[case]), tmp_path / "checkpoints", torch.device("cpu"))
    backend.load()
    state = TrainerState()
    for _ in backend.export():  # as engines get the version, so that it is kept as an old policy
        pass
    state.finish_step(backend.train(0, random_groups(0), lambda progress: None))
    for _ in backend.export():
        pass
    backend.save(tmp_path / "before", state)
    reports: list[str] = []

    number = 0
    while not reports or reports[-1] != "optimizer":  # the last point before the first optimizer step
        reports = leave_at(backend, number, step=1)
        number += 2 if reports[-1] != "forward_backward" else 1
    backend.save(tmp_path / "after", state)
    assert {"log_probs", "forward_backward", "optimizer"} >= set(reports) >= {"forward_backward", "optimizer"}
    assert files(tmp_path / "before") == files(tmp_path / "after")


@pytest.mark.usefixtures("process_group")
def test_a_step_whose_first_optimizer_step_was_taken_is_finished(dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = job_config(dense, num_steps_per_rollout=2)
    both = [FsdpBackend(config, tmp_path / "checkpoints", torch.device("cpu")) for _ in range(2)]
    for backend in both:
        backend.load()
    abandonment, answers, phases = Abandonment(), [], []

    def report(progress: Progress) -> None:
        if "optimizer" in phases:
            answers.append(abandonment.request())
        phases.append(progress.phase)

    asked = both[0].train(0, random_groups(0), report, abandonment)
    assert answers
    assert not any(answers)
    plain = both[1].train(0, random_groups(0), lambda progress: None)
    assert asked["train/loss"] == plain["train/loss"]
    assert all(torch.equal(left, right) for (_, left), (_, right) in zip(*(b.export() for b in both), strict=True))
