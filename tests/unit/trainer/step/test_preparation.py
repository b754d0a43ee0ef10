"""Whose log-probabilities the advantages' KL terms are computed from."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from trainer_cases import hf_log_probs, job_config, random_groups, train_recorded, write_dense_model

from miles.services.trainer.backends.fsdp.backend import FsdpBackend
from miles.types import SampleGroup, SampleStatus

pytestmark = pytest.mark.usefixtures("process_group")
KL_COEF, GAMMA = 0.3, 0.9


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_dense_model(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_dense_model(tmp_path_factory.mktemp("other"), layers=3)


def recorded_advantages(
    policy: pathlib.Path, groups: list[SampleGroup], **changes: Any
) -> dict[tuple[int, int], np.ndarray]:
    backend = FsdpBackend(job_config(policy, **changes), policy / "checkpoints", torch.device("cpu"))
    backend.load()
    _, known = train_recorded(backend._loaded.trainer, groups)
    return {place: numbers.advantages for place, numbers in known.items()}


def groups_with_a_tool() -> list[SampleGroup]:
    """One response holds tokens that the engine did not sample, and has no log-probabilities of."""
    groups = random_groups(51)
    sample = max(groups[0].samples, key=lambda s: s.response_length)
    sample.loss_mask = np.ones(sample.response_length, np.uint8)
    sample.loss_mask[1:3] = 0
    sample.rollout_log_probs[1:3] = 0
    return groups


@pytest.mark.parametrize("engines", [True, False])
def test_the_rewards_kl_is_that_of_the_old_policys_log_probs_wherever_they_come_from(
    policy: pathlib.Path, other: pathlib.Path, engines: bool
) -> None:
    groups = groups_with_a_tool()
    kl = {"advantage_estimator": "reinforce_plus_plus", "kl_coef": KL_COEF, "gamma": GAMMA, "ref_load": str(other)}
    found = recorded_advantages(policy, groups, use_rollout_logprobs=engines, **kl)
    own, reference = (hf_log_probs(folder, groups, 1.0) for folder in (policy, other))
    expected, masks = [], []
    for i, sample in enumerate(sample for group in groups for sample in group.samples):
        mask = np.ones(sample.response_length) if sample.loss_mask is None else sample.loss_mask
        rewards = -KL_COEF * ((sample.rollout_log_probs if engines else own[i]) - reference[i])
        rewards = np.where((mask == 0) & engines, 0, rewards)
        rewards[np.flatnonzero(mask)[-1]] += sample.reward
        returns, later = np.zeros(len(rewards)), 0.0
        for t in reversed(range(len(rewards))):
            returns[t] = later = rewards[t] + GAMMA * later
        expected.append(returns)
        masks.append(mask > 0)
    trained = np.concatenate(expected)[np.concatenate(masks)]
    places = [(sample.group_id, sample.index) for group in groups for sample in group.samples]
    for place, returns, mask in zip(places, expected, masks, strict=True):
        whitened = (returns - trained.mean()) / np.sqrt(trained.var(ddof=1) + 1e-8)
        np.testing.assert_allclose(found[place][mask], whitened[mask], atol=1e-4)


@pytest.mark.parametrize("engines", [True, False])
def test_the_teachers_kl_is_that_of_the_old_policys_log_probs_wherever_they_come_from(
    policy: pathlib.Path, other: pathlib.Path, engines: bool
) -> None:
    groups = random_groups(52)
    for sample in (sample for group in groups for sample in group.samples):
        sample.reward = 1.0  # no advantage but the teacher's
    distillation = {"use_opd": True, "opd_type": "megatron", "opd_teacher_load": str(other), "opd_kl_coef": 0.5}
    found = recorded_advantages(policy, groups, use_rollout_logprobs=engines, **distillation)
    own, teacher = (hf_log_probs(folder, groups, 1.0) for folder in (policy, other))
    for i, sample in enumerate(sample for group in groups for sample in group.samples):
        old = sample.rollout_log_probs if engines else own[i]
        expected = -0.5 * (old - teacher[i])
        np.testing.assert_allclose(found[sample.group_id, sample.index], expected, atol=2e-5)


def test_several_rewards_reach_the_advantages_of_gdpo(policy: pathlib.Path) -> None:
    groups = random_groups(53)
    rng = np.random.default_rng(53)
    samples = [sample for group in groups for sample in group.samples]
    for sample in samples:
        sample.reward = {"right": float(rng.integers(0, 2)), "style": float(rng.normal()), "unused": 9.0}
    samples[3].status, samples[3].reward = SampleStatus.FAILED, None
    gdpo = {
        "advantage_estimator": "gdpo",
        "gdpo_rewards": ["right", "style=0.5"],
        "reward_key": "right",
        "rm_type": None,
        "custom_rm_path": "rewards.score",
        "label_key": None,
    }
    backend = FsdpBackend(job_config(policy, **gdpo), policy / "checkpoints", torch.device("cpu"))
    backend.load()
    shaped_N = backend._loaded.trainer._preparation.shaped_rewards(samples).tolist()
    summed: dict[tuple[int, int], float] = {}
    for group in groups:
        scored = [sample for sample in group.samples if sample.reward is not None]
        for name, weight in (("right", 1.0), ("style", 0.5)):
            values = np.array([sample.reward[name] for sample in scored])
            centred = values - values.mean()
            for sample, value in zip(scored, centred / (values.std(ddof=1) + 1e-6), strict=True):
                place = sample.group_id, sample.index
                summed[place] = summed.get(place, 0.0) + weight * value
    spread = np.std(list(summed.values()), ddof=1)
    assert len(summed) == 15
    expected = [summed.get((sample.group_id, sample.index), 0.0) / spread for sample in samples]
    np.testing.assert_allclose(shaped_N, expected, rtol=1e-4, atol=1e-5)
