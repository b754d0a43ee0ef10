"""On-policy distillation from a teacher that the trainer holds."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from trainer_cases import hf_log_probs, job_config, random_groups, train_recorded, write_dense_model

from miles.services.trainer.backends.fsdp.backend import FsdpBackend

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_dense_model(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model with more layers."""
    return write_dense_model(tmp_path_factory.mktemp("teacher"), layers=4)


def loaded(student: pathlib.Path, teacher: pathlib.Path, **changes: Any) -> FsdpBackend:
    distillation = {"use_opd": True, "opd_type": "megatron", "opd_teacher_load": str(teacher)}
    config = job_config(student, **distillation, **changes)
    backend = FsdpBackend(config, student / "checkpoints", torch.device("cpu"))
    backend.load()
    return backend


def test_the_divergence_from_the_teacher_is_subtracted_from_the_advantage(
    student: pathlib.Path, teacher: pathlib.Path
) -> None:
    groups = random_groups(31)
    backend = loaded(student, teacher, opd_kl_coef=0.5, rollout_temperature=0.7)
    metrics, known = train_recorded(backend._loaded.trainer, groups)
    samples = [sample for group in groups for sample in group.samples]
    own, others = (hf_log_probs(folder, groups, 0.7) for folder in (student, teacher))
    for group in groups:
        rewards = np.array([sample.reward for sample in group.samples])
        spread = rewards.std(ddof=1) + 1e-6 if rewards.std() else 1.0
        for sample, reward in zip(group.samples, (rewards - rewards.mean()) / spread, strict=True):
            i = samples.index(sample)
            expected = reward - 0.5 * (own[i] - others[i])
            np.testing.assert_allclose(known[sample.group_id, sample.index].advantages, expected, atol=2e-5)
    mean = np.mean([(a - b).mean() for a, b in zip(own, others, strict=True)])
    assert metrics["train/opd_reverse_kl"] == pytest.approx(mean, abs=1e-5)


def test_a_teacher_teaches_where_rewards_do_not(student: pathlib.Path, teacher: pathlib.Path) -> None:
    groups = random_groups(32)
    for sample in (sample for group in groups for sample in group.samples):
        sample.reward = 1.0
    metrics = dict(loaded(student, teacher).train(0, groups, lambda progress: None))
    assert metrics["train/grad_norm"] > 0
    itself = dict(loaded(student, student).train(0, groups, lambda progress: None))
    assert itself["train/opd_reverse_kl"] == 0
    assert itself["train/grad_norm"] == pytest.approx(0, abs=1e-6)
