"""Every policy loss through whole training steps of the FSDP backend, on one rank."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from trainer_cases import job_config, random_groups, train_recorded, write_dense_model

from miles.policy_loss_spec import POLICY_LOSS_SPECS
from miles.services.trainer.backends.fsdp.backend import FsdpBackend
from miles.types import SampleGroup

pytestmark = pytest.mark.usefixtures("process_group")

GRADIENT_STEPS: dict[str, Any] = {"adam_eps": 1.0, "lr": 1.0, "clip_grad": 0.0, "num_steps_per_rollout": 2}
"""Updates that are proportional to the gradient, the second of them off policy."""
LOSSES: dict[str, dict[str, Any]] = {name: {"policy_loss_type": name} for name in POLICY_LOSS_SPECS}
LOSSES["dro"]["dro_beta"] = 0.1


ESTIMATORS: dict[str, dict[str, Any]] = {
    "maxrl": {},
    "optimal_token_baseline": {},
    "gdpo": {"gdpo_rewards": ["right", "short=0.5"], "reward_key": "right", "rm_type": None, "custom_rm_path": "a.b"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_dense_model(tmp_path_factory.mktemp("model"))


def loaded(model: pathlib.Path, **changes: Any) -> FsdpBackend:
    backend = FsdpBackend(job_config(model, **changes), model / "checkpoints", torch.device("cpu"))
    backend.load()
    return backend


def groups_with_spread(seed: int) -> list[SampleGroup]:
    groups = random_groups(seed)
    for group in groups:
        for sample in group.samples:
            sample.reward = float(sample.index % 2)
    return groups


def gain(backend: FsdpBackend, groups: list[SampleGroup]) -> float:
    """How much likelier a rollout's training makes its responses, by their advantages."""
    metrics, before = train_recorded(backend._loaded.trainer, groups)
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["train/grad_norm"] > 0
    _, after = train_recorded(backend._loaded.trainer, groups, 1)
    moved = [
        (numbers.advantages * (after[place].train_log_probs - numbers.train_log_probs)).mean()
        for place, numbers in before.items()
    ]
    return float(sum(moved))


@pytest.mark.parametrize("name", LOSSES)
def test_every_policy_loss_makes_good_responses_likelier(model: pathlib.Path, name: str) -> None:
    assert gain(loaded(model, **GRADIENT_STEPS, **LOSSES[name]), groups_with_spread(61)) > 0


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_that_compare_samples_in_other_ways_make_good_responses_likelier(
    model: pathlib.Path, name: str
) -> None:
    groups = groups_with_spread(63)
    for sample in (sample for group in groups for sample in group.samples if name == "gdpo"):
        sample.reward = {"right": sample.reward, "short": -float(sample.response_length)}
    assert gain(loaded(model, advantage_estimator=name, **GRADIENT_STEPS, **ESTIMATORS[name]), groups) > 0


@pytest.mark.parametrize("name", LOSSES)
def test_how_samples_are_cut_into_micro_batches_changes_nothing(model: pathlib.Path, name: str) -> None:
    found = []
    for tokens in (32, 2048):
        backend = loaded(model, **GRADIENT_STEPS, **LOSSES[name], max_tokens_per_gpu=tokens)
        metrics = backend.train(0, groups_with_spread(62), lambda progress: None)
        found.append((metrics, {key: tensor.clone() for key, tensor in backend.export()}))
    (metrics, weights), (whole_metrics, whole_weights) = found
    for key, tensor in weights.items():
        torch.testing.assert_close(tensor, whole_weights[key], rtol=1e-5, atol=1e-5)
    own = {key: value for key, value in metrics.items() if key.startswith("train/")}
    assert own == pytest.approx({key: whole_metrics[key] for key in own}, rel=1e-4, abs=1e-6)


def test_echo_learns_to_predict_observations_even_without_any_advantage(model: pathlib.Path) -> None:
    groups = random_groups(64)
    samples = [sample for group in groups for sample in group.samples]
    for sample in samples:
        sample.reward = 1.0
        sample.loss_mask = np.ones(sample.response_length, np.uint8)
        sample.loss_mask[1:4] = 0  # what a tool has said
    backend = loaded(model, **GRADIENT_STEPS, echo_loss_coef=0.05)
    metrics, before = train_recorded(backend._loaded.trainer, groups)
    _, after = train_recorded(backend._loaded.trainer, groups, 1)
    nlls, later = (
        [-numbers.train_log_probs[numbers.mask == 0] for numbers in found.values()] for found in (before, after)
    )
    assert metrics["train/pg_loss"] == 0
    assert metrics["train/loss"] == pytest.approx(0.05 * metrics["train/echo_loss"])
    assert sum(x.mean() for x in later if len(x)) < sum(x.mean() for x in nlls if len(x))
    assert 0 < metrics["train/echo_loss"] < sum(x.mean() for x in nlls if len(x)) / len(samples)
