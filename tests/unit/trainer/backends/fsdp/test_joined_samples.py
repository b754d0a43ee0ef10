"""Samples without advantage in the micro-batches of those that are trained on, as on a GPU."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from trainer_cases import VOCAB, job_config, random_groups, write_dense_model

from miles.services.trainer.backends.fsdp.backend import FsdpBackend
from miles.services.trainer.backends.fsdp.step import JOINED_WORK, joinable_tokens
from miles.services.trainer.batch.rollout_batch import RolloutBatch, build_batch, in_order
from miles.types import SampleGroup

pytestmark = pytest.mark.usefixtures("process_group")

ALL = 10**9
RARE = VOCAB - 1
"""A token that one sample alone has."""


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_dense_model(tmp_path_factory.mktemp("untied"), tied=False)


def groups_of_two_kinds() -> list[SampleGroup]:
    """Rewards of groups 1 and 3 are equal, so their advantages are 0."""
    groups = random_groups(13)
    for sample in (*groups[1].samples, *groups[3].samples):
        sample.reward = 1.0
    for sample in (sample for group in groups for sample in group.samples):
        sample.tokens[sample.tokens == RARE] = RARE - 1
    return groups


def after_one_step(
    model: pathlib.Path,
    groups: list[SampleGroup],
    joined_tokens: int,
    unknown: int | None = None,
    *,
    one_graph: bool = False,
) -> tuple[dict[str, float], dict[str, torch.Tensor], int]:
    """Metrics and weights after a step that shows the gradient, and how many micro-batches it took.

    The embedding of token `unknown` is infinite. `one_graph` is as with torch_compile.
    """
    config = job_config(model, adam_eps=1.0, lr=1.0, clip_grad=0.0, max_tokens_per_gpu=4096)
    backend = FsdpBackend(config, model / "checkpoints", torch.device("cpu"))
    backend.load()
    if unknown is not None:
        with torch.no_grad():
            backend._loaded.roles.policy.model.get_input_embeddings().weight[unknown] = torch.inf
    backend._loaded.trainer.joined_tokens = joined_tokens
    backend._loaded.roles.policy._one_graph = one_graph
    reports = []
    metrics = dict(backend.train(0, groups, reports.append))
    return metrics, {name: weight.clone() for name, weight in backend.export()}, reports[-1].micro_batches


def batch(groups: list[SampleGroup], joined_tokens: int, **changes: Any) -> RolloutBatch:
    idle = [i for i, sample in enumerate(in_order(groups)) if sample.group_id in (1, 3)]
    config = job_config(pathlib.Path("model"), **changes)
    return build_batch(in_order(groups), config, 0, 1, idle, joined_tokens)


def test_joined_samples_leave_the_gradient_and_the_metrics_as_they_are(untied: pathlib.Path) -> None:
    groups = groups_of_two_kinds()
    apart, weights_apart, passes_apart = after_one_step(untied, groups, 0)
    together, weights, passes = after_one_step(untied, groups, ALL)
    assert (passes_apart, passes) == (2, 1)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, weights_apart[name], rtol=1e-6, atol=1e-6, msg=name)
    for name in apart.keys() - {"perf/log_probs_time"}:
        assert together[name] == pytest.approx(apart[name], rel=1e-5, abs=1e-7), name


def test_a_joined_sample_that_is_not_finite_stays_out_of_the_gradient(untied: pathlib.Path) -> None:
    groups = groups_of_two_kinds()
    odd = max(groups[1].samples, key=lambda sample: sample.response_length)
    odd.tokens[odd.prompt_length] = RARE
    _, expected, _ = after_one_step(untied, groups, 0, RARE)
    metrics, weights, _ = after_one_step(untied, groups, ALL, RARE)
    assert metrics["train/grad_norm"] > 0
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0, msg=name)


def test_samples_join_only_where_that_takes_no_more_micro_batches() -> None:
    groups = groups_of_two_kinds()
    rows = sum(len(s.tokens) for group in groups for s in group.samples)
    enough, too_small = (batch(groups, ALL, max_tokens_per_gpu=limit).steps[0] for limit in (rows, rows // 4))
    assert (len(enough.micro_batches), len(enough.observed), len(enough.joined)) == (1, 0, 8)
    trained = [i for part in too_small.micro_batches for i in part.samples]
    assert too_small.observed
    assert not too_small.joined
    assert len(trained) == 8


def test_more_tokens_than_may_join_are_run_apart() -> None:
    groups = groups_of_two_kinds()
    tokens = sum(len(sample.tokens) for sample in (*groups[1].samples, *groups[3].samples))
    below, exactly = (batch(groups, limit, max_tokens_per_gpu=4096).steps[0] for limit in (tokens - 1, tokens))
    assert below.observed
    assert not exactly.observed


@pytest.mark.parametrize(
    ("device_type", "ranks", "train_dtype", "keeps_routing", "parameters", "tokens"),
    [
        ("cuda", 1, "bfloat16", False, 135 * 10**6, 14_814),
        ("cuda", 1, "float32", False, 135 * 10**6, 14_814),
        ("cuda", 1, "bfloat16", False, JOINED_WORK, 1),
        ("cuda", 1, "bfloat16", False, JOINED_WORK + 1, 0),
        ("cuda", 1, "bfloat16", False, 0, JOINED_WORK),
        ("cuda", 1, "float16", False, 135 * 10**6, 0),
        ("cuda", 1, "bfloat16", True, 135 * 10**6, 0),
        ("cuda", 2, "bfloat16", False, 135 * 10**6, 0),
        ("cpu", 1, "bfloat16", False, 135 * 10**6, 0),
    ],
)
def test_samples_join_on_one_gpu_where_they_can_be_taken_apart_again_and_the_model_is_small(
    device_type: str, ranks: int, train_dtype: str, keeps_routing: bool, parameters: int, tokens: int
) -> None:
    found = joinable_tokens(device_type, ranks, train_dtype, keeps_routing=keeps_routing, parameters=parameters)
    assert found == tokens


def test_on_the_cpu_samples_without_advantage_are_run_apart(untied: pathlib.Path) -> None:
    backend = FsdpBackend(job_config(untied), untied / "checkpoints", torch.device("cpu"))
    backend.load()
    assert backend._loaded.trainer.joined_tokens == 0


def test_observing_samples_with_the_graph_of_training_changes_nothing(untied: pathlib.Path) -> None:
    groups = groups_of_two_kinds()
    metrics, weights, _ = after_one_step(untied, groups, 0, one_graph=True)
    expected, expected_weights, _ = after_one_step(untied, groups, 0)
    time = "perf/log_probs_time"
    assert metrics | {time: 0.0} == expected | {time: 0.0}
    assert all(weight.equal(expected_weights[name]) for name, weight in weights.items())
