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
    config = job_config(student, **{**distillation, **changes})
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


STRATEGIES = ("only-student", "only-teacher", "intersection", "union", "xor")


def distributions(folder: pathlib.Path, groups: list[Any]) -> list[torch.Tensor]:
    """log p of every token at each response position, float64 [R, V] a sample, by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    found = []
    with torch.no_grad():
        for sample in (sample for group in groups for sample in group.samples):
            logits = model(torch.tensor(sample.tokens[None].astype(np.int64))).logits[0]
            found.append(logits[sample.prompt_length - 1 : -1].log_softmax(-1))
    return found


def set_divergence(student: torch.Tensor, teacher: torch.Tensor, strategy: str, mode: str, k: int) -> float:
    """The divergence at one position, from both distributions [V], token by token."""
    own, others = student.topk(k).indices.tolist(), teacher.topk(k).indices.tolist()
    members = {
        "only-student": own,
        "only-teacher": others,
        "intersection": [v for v in own if v in others],
        "union": list({*own, *others}),
        "xor": list({*own} ^ {*others}),
    }[strategy]
    weigh = {"student_p": student, "teacher_p": teacher, "none": torch.zeros_like(student)}[mode]
    weights = {v: weigh[v].exp().item() for v in members}
    total = 1.0 if strategy == "xor" or not members else sum(weights.values())
    return sum(weights[v] / total * (student[v] - teacher[v]).item() for v in members)


@pytest.mark.parametrize(
    ("strategy", "mode"),
    [*((strategy, "student_p") for strategy in STRATEGIES), ("xor", "none"), ("union", "teacher_p")],
)
def test_the_divergence_over_likeliest_tokens(
    student: pathlib.Path, teacher: pathlib.Path, strategy: str, mode: str
) -> None:
    groups = random_groups(33)
    for sample in (sample for group in groups for sample in group.samples):
        sample.reward = 1.0
    sets = {"opd_log_prob_top_k": 4, "opd_top_k_strategy": strategy, "opd_reward_weight_mode": mode}
    _, known = train_recorded(loaded(student, teacher, **sets)._loaded.trainer, groups)
    own, others = distributions(student, groups), distributions(teacher, groups)
    samples = [sample for group in groups for sample in group.samples]
    for i, sample in enumerate(samples):
        rows = zip(own[i], others[i], strict=True)
        expected = [-set_divergence(s, t, strategy, mode, 4) for s, t in rows]
        np.testing.assert_allclose(known[sample.group_id, sample.index].advantages, expected, atol=2e-5)


@pytest.mark.parametrize("top_k", [0, 3])
def test_each_sample_has_the_teacher_that_its_metadata_names(
    student: pathlib.Path, teacher: pathlib.Path, tmp_path: pathlib.Path, top_k: int
) -> None:
    second = write_dense_model(tmp_path, layers=2)
    groups = random_groups(34)
    samples = [sample for group in groups for sample in group.samples]
    for i, sample in enumerate(samples):
        sample.reward = 1.0
        sample.metadata["opd_teacher"] = ("deep", "flat", "unknown")[i % 3]
    one_by_one = [
        train_recorded(loaded(student, folder, opd_log_prob_top_k=top_k)._loaded.trainer, groups)[1]
        for folder in (teacher, second, second)
    ]
    named = {"opd_teacher_load": [f"deep={teacher}", f"flat={second}", f"default={second}"]}
    _, known = train_recorded(loaded(student, teacher, opd_log_prob_top_k=top_k, **named)._loaded.trainer, groups)
    for i, sample in enumerate(samples):
        place = sample.group_id, sample.index
        expected = one_by_one[i % 3][place].advantages
        np.testing.assert_allclose(known[place].advantages, expected, atol=1e-5)


def test_micro_batches_make_no_difference_to_sets(student: pathlib.Path, teacher: pathlib.Path) -> None:
    sets = {"opd_log_prob_top_k": 4, "opd_top_k_strategy": "union"}
    groups = random_groups(35)
    metrics = [
        loaded(student, teacher, max_tokens_per_gpu=size, **sets).train(0, groups, lambda progress: None)
        for size in (30, 300)
    ]
    for name in ("train/opd_reverse_kl", "train/grad_norm", "train/pg_loss"):
        assert dict(metrics[0])[name] == pytest.approx(dict(metrics[1])[name], rel=1e-4, abs=1e-6)


def test_scores_of_servers_count_as_those_of_a_model(student: pathlib.Path, teacher: pathlib.Path) -> None:
    groups = random_groups(36)
    samples = [sample for group in groups for sample in group.samples]
    own, others = distributions(student, groups), distributions(teacher, groups)
    for sample, mine, theirs in zip(samples, own, others, strict=True):
        sample.reward = 1.0
        top = mine.topk(4).indices
        sample.teacher_tokens = top.numpy().astype(np.int32)
        sample.teacher_token_log_probs = theirs.gather(1, top).numpy().astype(np.float32)
        tokens = torch.from_numpy(sample.response_tokens.astype(np.int64))
        sample.teacher_log_probs = theirs.gather(1, tokens[:, None])[:, 0].numpy().astype(np.float32)
    served = {"opd_type": "sglang", "opd_teacher_load": None, "rm_url": "http://localhost:1/generate"}
    for top_k in (0, 4):
        _, held = train_recorded(loaded(student, teacher, opd_log_prob_top_k=top_k)._loaded.trainer, groups)
        _, sent = train_recorded(loaded(student, teacher, opd_log_prob_top_k=top_k, **served)._loaded.trainer, groups)
        for place, numbers in held.items():
            np.testing.assert_allclose(sent[place].advantages, numbers.advantages, atol=2e-5)
    samples[0].teacher_log_probs = None
    with pytest.raises(ValueError, match="no server of a teacher scored it"):
        loaded(student, teacher, **served).train(0, groups, lambda progress: None)
