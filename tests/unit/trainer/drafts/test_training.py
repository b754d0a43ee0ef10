from __future__ import annotations

import pathlib

import pytest
import torch
from draft_trainer_process import draft_config, samples_of_step
from trainer_cases import write_dense_model

from miles.config import JobConfig
from miles.drafts.initial import ensure_initial
from miles.services.trainer.drafts.checkpoint import UnusableDraftCheckpointError
from miles.services.trainer.drafts.learner import DraftLearner, create_learner
from miles.services.trainer.drafts.training import DraftBrokenError, DraftTraining

CPU = torch.device("cpu")


def learner_of(config: JobConfig) -> DraftLearner:
    ensure_initial(config)
    return create_learner(config, pathlib.Path(config.rollout.sglang_args["speculative_draft_model_path"]), CPU)


def training_of(config: JobConfig, policy_step: int = 0) -> DraftTraining:
    training = DraftTraining(config, pathlib.Path(config.services.run_dir), learner_of(config), CPU)
    training.policy_is_at(policy_step)
    return training


def learn(training: DraftTraining, step: int) -> None:
    for _ in training.learn(samples_of_step(step, 4), step):
        pass


def publish(training: DraftTraining) -> None:
    """As the job does."""
    training.finish_version()
    training.published(0.25)
    training.save_version()


def test_a_version_is_due_every_few_recordings_and_has_the_means_of_all(tmp_path: pathlib.Path) -> None:
    training = training_of(draft_config(write_dense_model(tmp_path / "model"), draft_update_interval=2))
    learn(training, 0)
    assert not training.is_version_due
    learn(training, 1)
    assert training.is_version_due
    publish(training)
    assert (training.version, training.recordings, training.is_version_due) == (1, 2, False)
    parts = [training.metrics[f"draft/{part}_s"] for part in ("train", "save", "publish")]
    assert training.metrics["draft/update_s"] == pytest.approx(sum(parts))
    assert 0 <= training.metrics["draft/agreement"] <= 1


def test_what_was_not_published_is_saved_as_a_version_of_its_own(tmp_path: pathlib.Path) -> None:
    config = draft_config(write_dense_model(tmp_path / "model"), draft_update_interval=2)
    first = training_of(config)
    for step in (0, 1, 2):
        learn(first, step)
        if first.is_version_due:
            first.finish_version()
    first.save_at_end(tmp_path / "trained")
    weights = dict(first.learner.export())

    second = training_of(config, policy_step=3)
    assert (second.version, second.recordings, second.cursor.last) == (2, 3, 2)
    assert all(tensor.equal(weights[name]) for name, tensor in second.learner.export())
    third = training_of(config, policy_step=1)
    assert third.cursor.last == 0, "the policy was taken back, and its recordings come again"
    changed = draft_config(tmp_path / "model", sglang_speculative_draft_model_path=str(tmp_path / "trained"))
    with pytest.raises(
        UnusableDraftCheckpointError, match=r"its draft_model is \(the run's own\), and that of the run .*trained"
    ):
        training_of(changed)


def test_what_was_learned_before_the_first_version_comes_again_after_a_kill(tmp_path: pathlib.Path) -> None:
    config = draft_config(write_dense_model(tmp_path / "model"), draft_update_interval=6)
    first = training_of(config, policy_step=2)
    for step in (2, 3, 4):
        learn(first, step)
    again = training_of(config, policy_step=5)
    assert (again.version, again.recordings) == (0, 0)
    assert again.cursor.next([2, 3, 4]) == 2
    assert again.cursor.reach(4) == range(2, 4), "what was removed meanwhile is missed"


def test_a_number_that_engines_may_know_is_never_given_to_another_draft(tmp_path: pathlib.Path) -> None:
    config = draft_config(write_dense_model(tmp_path / "model"))
    first = training_of(config)
    learn(first, 0)
    publish(first)
    saved = {name: tensor.clone() for name, tensor in first.learner.export()}
    learn(first, 1)
    first.finish_version()  # from here on it may be published; the trainer is killed before it saves

    second = training_of(config, policy_step=2)
    assert (second.version, second.recordings, second.cursor.next([0, 1])) == (3, 1, 1)
    assert all(tensor.equal(saved[name]) for name, tensor in second.learner.export())
    assert training_of(config, policy_step=2).version == 4, "what was not saved may have been published too"
    last = training_of(config, policy_step=2)
    last.save_version()
    assert training_of(config, policy_step=2).version == last.version == 5


def test_a_run_whose_folder_moved_goes_on_with_its_own_head(tmp_path: pathlib.Path) -> None:
    model = write_dense_model(tmp_path / "model")
    first = training_of(draft_config(model, run_dir=str(tmp_path / "here")))
    learn(first, 0)
    publish(first)
    (tmp_path / "here").rename(tmp_path / "there")
    assert training_of(draft_config(model, run_dir=str(tmp_path / "there")), policy_step=1).version == 1


def test_a_run_that_ends_before_anything_is_learned_leaves_nothing(tmp_path: pathlib.Path) -> None:
    training_of(draft_config(write_dense_model(tmp_path / "model"))).save_at_end(tmp_path / "trained")
    assert not (tmp_path / "trained").exists()


def test_weights_that_are_no_numbers_are_neither_saved_nor_published(tmp_path: pathlib.Path) -> None:
    config = draft_config(write_dense_model(tmp_path / "model"))
    training = training_of(config)
    learn(training, 0)
    publish(training)
    with torch.no_grad():
        next(iter(training.learner.state().values())).view(-1)[0] = float("nan")
    learn(training, 1)
    with pytest.raises(DraftBrokenError, match="version 1 is gone on from: lower draft_learning_rate"):
        training.finish_version()
    again = training_of(config, policy_step=2)
    assert (again.version, again.cursor.last) == (1, 0)
    assert all(bool(torch.isfinite(tensor).all()) for _, tensor in again.learner.export())
