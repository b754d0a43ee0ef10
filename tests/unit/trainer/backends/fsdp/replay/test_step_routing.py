"""The share of tokens that the trainer routes differently than the engine did."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from trainer_cases import divert, job_config, random_groups, set_own_routing, write_dense_model, write_moe_model

from miles.services.trainer.backends.fsdp.backend import FsdpBackend
from miles.types import SampleGroup

pytestmark = pytest.mark.usefixtures("process_group")
NAME = "train/tokens_routed_differently"


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_moe_model(tmp_path_factory.mktemp("moe"))


def trained(
    model: pathlib.Path, groups: list[SampleGroup], **changes: Any
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics of a step, without its time, and the weights after it."""
    config = job_config(model, share_prompts=False, **changes)
    backend = FsdpBackend(config, model / "checkpoints", torch.device("cpu"))
    backend.load()
    metrics = dict(backend.train(0, groups, lambda progress: None))
    return {n: v for n, v in metrics.items() if n.startswith("train/")}, dict(backend.export())


def own_groups(model: pathlib.Path, *, every: int | None = None) -> tuple[list[SampleGroup], float]:
    """Groups with the model's own routing, and the share of their tokens whose routing was changed."""
    groups = random_groups(3)
    set_own_routing(model, groups)
    return groups, 0.0 if every is None else divert(groups, every)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": True},
        {"use_kl_loss": True, "kl_loss_coef": 0.1},  # a reference beside the policy
        {"num_steps_per_rollout": 4, "lr": 0.0},  # a pass for log-probabilities before the training pass
        {"use_routing_replay": True},
    ],
)
def test_tokens_are_counted_once_each(moe: pathlib.Path, changes: dict[str, Any]) -> None:
    same, _ = own_groups(moe)
    assert trained(moe, same, observe_rollout_routing=True, **changes)[0][NAME] == 0
    groups, share = own_groups(moe, every=5)
    assert 0.19 < share < 0.21
    assert trained(moe, groups, observe_rollout_routing=True, **changes)[0][NAME] == pytest.approx(share, abs=1e-12)


def test_a_token_that_differs_in_several_layers_counts_as_one(moe: pathlib.Path) -> None:
    groups = random_groups(3, routing=(8, 2, 2))
    share = trained(moe, groups, observe_rollout_routing=True)[0][NAME]
    assert 0.9 < share <= 1  # of random experts in two layers


def test_the_order_of_a_tokens_experts_does_not_matter(moe: pathlib.Path) -> None:
    groups, _ = own_groups(moe)
    for sample in (sample for group in groups for sample in group.samples):
        assert sample.rollout_routed_experts is not None
        sample.rollout_routed_experts = sample.rollout_routed_experts[:, :, ::-1].copy()
    assert trained(moe, groups, observe_rollout_routing=True)[0][NAME] == 0


def test_replay_leaves_no_token_that_goes_elsewhere(moe: pathlib.Path) -> None:
    groups, share = own_groups(moe, every=5)
    metrics, _ = trained(moe, groups, use_rollout_routing_replay=True, gradient_checkpointing=True)
    assert metrics[NAME] == 0
    assert metrics["train/routing_difference"] > share / 3  # but routers would have


def test_observing_changes_nothing(moe: pathlib.Path) -> None:
    groups, _ = own_groups(moe, every=5)
    metrics, weights = trained(moe, groups)
    observed, same = trained(moe, groups, observe_rollout_routing=True)
    assert NAME not in metrics
    assert metrics == {name: value for name, value in observed.items() if name != NAME}
    assert all(weights[name].equal(same[name]) for name in weights)


def test_a_rollout_of_which_the_policy_learns_nothing_has_no_share(moe: pathlib.Path) -> None:
    groups, _ = own_groups(moe)
    critic = {"advantage_estimator": "ppo", "num_critic_only_steps": 1}
    assert NAME not in trained(moe, groups, observe_rollout_routing=True, **critic)[0]


def test_samples_without_the_engines_routing_are_named(moe: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"of group .* has no rollout_routed_experts; with .* observe_rollout_routing"):
        trained(moe, random_groups(1), observe_rollout_routing=True)
    with pytest.raises(ValueError, match="routing of 3 layers"):
        trained(moe, random_groups(1, routing=(8, 3, 2)), observe_rollout_routing=True)


def test_a_dense_model_has_no_routing_to_observe(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="no softmax top-k router"):
        trained(write_dense_model(tmp_path / "dense"), random_groups(1), observe_rollout_routing=True)
