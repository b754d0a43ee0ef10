"""Metrics are means over what the loss divides by."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from trainer_cases import hf_log_probs, job_config, random_groups, write_dense_model

from miles.algorithms.metrics import MetricSum, reduce_metrics
from miles.services.trainer.backends.fsdp.backend import FsdpBackend
from miles.services.trainer.batch.rollout_batch import OptimizerStepPlan
from miles.services.trainer.step.loss_denominator import untrained_counts
from miles.types import SampleGroup, SampleStatus


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_dense_model(tmp_path_factory.mktemp("dense"))


def groups_with_untrained_samples() -> list[SampleGroup]:
    """16 samples: two removed, one that failed, one without a trained token."""
    groups = random_groups(41)
    groups[0].samples[1].remove_sample = groups[0].samples[2].remove_sample = True
    groups[1].samples[0].status, groups[1].samples[0].reward = SampleStatus.FAILED, None
    masked = groups[2].samples[3]
    masked.loss_mask = np.zeros(masked.response_length, np.uint8)
    return groups


def train(folder: pathlib.Path, groups: list[SampleGroup], **changes: Any) -> dict[str, float]:
    backend = FsdpBackend(job_config(folder, **changes), folder / "checkpoints", torch.device("cpu"))
    backend.load()
    return dict(backend.train(0, groups, lambda progress: None))


def is_trained(place: tuple[int, int]) -> bool:
    return place not in {(0, 1), (0, 2), (1, 0), (2, 3)}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("per_token", [False, True])
def test_means_of_a_step_are_over_the_samples_or_tokens_that_its_loss_divides_by(
    dense: pathlib.Path, per_token: bool
) -> None:
    groups = groups_with_untrained_samples()
    metrics = train(dense, groups, calculate_per_token_loss=per_token, rewards_normalization=False)
    samples = [sample for group in groups for sample in group.samples]
    own = hf_log_probs(dense, groups, 1.0)
    differences, losses, tokens = [], [], 0
    for sample, log_probs in zip(samples, own, strict=True):
        if is_trained((sample.group_id, sample.index)):
            gap = np.abs(log_probs - sample.rollout_log_probs)
            differences.append(gap.sum() if per_token else gap.mean())
            losses.append(-sample.reward * (sample.response_length if per_token else 1))
            tokens += sample.response_length
    divisor = tokens if per_token else 16
    assert metrics["train/train_rollout_logprob_abs_diff"] == pytest.approx(sum(differences) / divisor, rel=1e-4)
    assert metrics["train/pg_loss"] == metrics["train/loss"] == pytest.approx(sum(losses) / divisor, rel=1e-5)


@pytest.mark.usefixtures("process_group")
def test_means_of_several_steps_are_means_of_the_steps_means(dense: pathlib.Path) -> None:
    """Steps of one size, though more of the first one's samples are not trained on."""
    groups = groups_with_untrained_samples()
    rates = {"num_steps_per_rollout": 2, "rewards_normalization": False, "lr": 0.0}
    both = train(dense, groups, **rates)
    assert both["train/pg_loss"] == pytest.approx(train(dense, groups, rewards_normalization=False)["train/pg_loss"])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_split_over_ranks_does_not_change_a_mean(ranks: int) -> None:
    step = OptimizerStepPlan(num_samples=9, num_trained=6, num_tokens=30, micro_batches=(), observed=())
    share = 6 // ranks
    parts = []
    for rank in range(ranks):
        micro_batch = {"train/loss": MetricSum(torch.tensor(2.0 * share), share)}
        parts += [micro_batch, {"train/loss": MetricSum(torch.tensor(0.0), 0)}]
        if rank == 0:
            parts.append(untrained_counts(parts, step, per_token=False))
    assert reduce_metrics(parts) == {"train/loss": pytest.approx(12 / 9)}
    assert untrained_counts(parts, step, per_token=True)["train/loss"].count == 0


def test_metrics_of_several_types_are_added_up_exactly() -> None:
    large = 2**24 + 1  # not in float32
    part = {"counted": MetricSum(torch.tensor(large), 1), "mean": MetricSum(torch.tensor(0.5), 2)}
    assert reduce_metrics([part]) == {"counted": large, "mean": 0.25}
    assert reduce_metrics([part, part]) == {"counted": large, "mean": 0.25}
