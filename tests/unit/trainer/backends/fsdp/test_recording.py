"""What the FSDP backend leaves for the draft model is what the stock model computes, and costs the policy nothing."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from recorded_reference import FLAGS, TEMPERATURE, assert_as_the_stock_model, recorded_in, samples_of
from trainer_cases import job_config, random_groups, set_own_routing, write_dense_model, write_moe_model

from miles.drafts.recordings import read, steps
from miles.services.trainer.backends.fsdp.backend import FsdpBackend
from miles.services.trainer.backends.fsdp.learner import FsdpPolicy
from miles.services.trainer.backends.fsdp.model import scoring_head
from miles.types import SampleGroup

pytestmark = pytest.mark.usefixtures("process_group")

LAYERS = (-1, 1, 2, 3)
"""Of a model of seven layers."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_dense_model(tmp_path_factory.mktemp("dense"), layers=7)


def loaded(model: pathlib.Path, root: pathlib.Path, **changes: Any) -> FsdpBackend:
    flags = {**FLAGS, **recorded_in(root), **changes}
    backend = FsdpBackend(job_config(model, **flags), root.parent / "checkpoints", torch.device("cpu"))
    backend.load()
    return backend


def train(backend: FsdpBackend, groups: list[SampleGroup], step: int = 0) -> dict[str, float]:
    return dict(backend.train(step, groups, lambda progress: None))


def weights(backend: FsdpBackend) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in backend.export()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"share_prompts": False, "gradient_checkpointing": True},
        {"num_steps_per_rollout": 2, "global_batch_size": 8, "gradient_checkpointing": True},
        {"use_rollout_logprobs": True},
        {"lora_rank": 2},
        {"use_kl_loss": True, "kl_loss_coef": 0.1, "advantage_estimator": "ppo", "critic_lr": 1e-3},
    ],
    ids=["shared prompts", "recomputed", "two steps", "engine's log-probs", "adapter", "critic"],
)
def test_they_are_what_the_stock_model_computes(
    dense: pathlib.Path, tmp_path: pathlib.Path, changes: dict[str, Any]
) -> None:
    groups = random_groups(1)
    groups[1].samples[2].loss_mask = np.arange(groups[1].samples[2].response_length, dtype=np.uint8) % 2
    groups[1].samples[2].loss_mask[:1] = 1
    backend = loaded(dense, tmp_path / "recordings", **changes)
    metrics = train(backend, groups)
    samples = samples_of(groups)[: changes.get("global_batch_size")]
    assert_as_the_stock_model(dense, read(tmp_path / "recordings", 0), samples, LAYERS)
    assert metrics["draft/recorded_tokens"] == sum(len(sample.tokens) for sample in samples)
    assert metrics["draft/record_s"] > 0
    assert not backend.warnings


def test_samples_that_are_equal_or_go_on_from_others_are_whole(dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    groups = random_groups(2)
    first, second, third, _ = groups[0].samples
    second.tokens, second.response_length = first.tokens.copy(), first.response_length
    longer = np.concatenate([first.tokens, first.tokens[:2]])
    third.tokens, third.response_length = longer, first.response_length + 2
    for sample in (second, third):
        sample.rollout_log_probs = np.zeros(sample.response_length, np.float32)
        sample.weight_versions = ()
    train(loaded(dense, tmp_path / "recordings", max_tokens_per_gpu=1024), groups)
    assert_as_the_stock_model(dense, read(tmp_path / "recordings", 0), samples_of(groups), LAYERS)


def test_samples_without_gradient_are_recorded_too(dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    groups = random_groups(1)
    for sample in groups[0].samples:
        sample.reward = 1.0
    train(loaded(dense, tmp_path / "recordings"), groups)
    assert_as_the_stock_model(dense, read(tmp_path / "recordings", 0), samples_of(groups), LAYERS)


def test_a_head_that_holds_no_logits_gives_the_same(dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    groups = random_groups(1)
    backend = loaded(dense, tmp_path / "recordings", log_probs_chunk_size=7, entropy_coef=0.01)
    policy = backend._loaded.roles.policy
    assert isinstance(policy, FsdpPolicy)
    head = policy.model.lm_head
    assert isinstance(head, scoring_head.ScoringHead)
    options = policy._forward._options
    object.__setattr__(options, "logit_bytes", 0)
    train(backend, groups)
    assert_as_the_stock_model(dense, read(tmp_path / "recordings", 0), samples_of(groups), LAYERS)


def test_a_model_with_experts_whose_routing_is_replayed(tmp_path: pathlib.Path) -> None:
    model, groups = write_moe_model(tmp_path / "moe"), random_groups(1)
    set_own_routing(model, groups)
    train(loaded(model, tmp_path / "recordings", use_rollout_routing_replay=True), groups)
    assert_as_the_stock_model(model, read(tmp_path / "recordings", 0), samples_of(groups), (-1, 0))


def test_a_draft_that_reads_tokens_alone_gets_no_hidden_states(dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    groups = random_groups(1)
    standalone = {"sglang_speculative_algorithm": "STANDALONE", "sglang_speculative_draft_model_path": str(dense)}
    train(loaded(dense, tmp_path / "recordings", **standalone), groups)
    assert_as_the_stock_model(dense, read(tmp_path / "recordings", 0), samples_of(groups), ())


@pytest.mark.slow  # the compiler traces for half a minute on a busy machine
def test_compiled_layers_are_read(dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    from miles.services.trainer.backends.fsdp.model.compiled_layers import compile_layers

    groups = random_groups(1)
    backend = loaded(dense, tmp_path / "recordings")
    policy = backend._loaded.roles.policy
    assert isinstance(policy, FsdpPolicy)
    torch.compiler.reset()
    compile_layers(policy.model, backend="eager")
    train(backend, groups)
    torch.compiler.reset()
    assert_as_the_stock_model(dense, read(tmp_path / "recordings", 0), samples_of(groups), LAYERS)


@pytest.mark.parametrize("share", [True, False])
def test_recording_changes_no_bit_of_what_is_trained(dense: pathlib.Path, tmp_path: pathlib.Path, share: bool) -> None:
    """Adam's first step is one of signs: two steps show the gradients' size too."""
    results = []
    plainly = job_config(dense, **TEMPERATURE, share_prompts=share)
    for backend in (
        FsdpBackend(plainly, tmp_path / "checkpoints", torch.device("cpu")),
        loaded(dense, tmp_path / "recordings", share_prompts=share),
    ):
        backend.load()
        metrics = [train(backend, random_groups(step), step) for step in range(2)]
        results.append((weights(backend), metrics))
    assert steps(tmp_path / "recordings") == [0, 1]
    (plain, plain_metrics), (recorded, recorded_metrics) = results
    assert all(torch.equal(plain[name], recorded[name]) for name in plain)
    for one, other in zip(plain_metrics, recorded_metrics, strict=True):
        new = {"draft/recorded_tokens", "draft/record_s"}
        assert other.keys() - one.keys() == new
        assert {key: one[key] for key in one if "time" not in key} == {
            key: other[key] for key in other if "time" not in key and key not in new
        }
