"""PPO on one rank: the critic's values, its gradient, what trains when, and what a checkpoint brings back."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer_cases import hf_log_probs, job_config, random_groups, train_recorded, write_dense_model, write_moe_model

from miles.checkpoint_folder import folder_name
from miles.services.trainer.backends.fsdp.backend import FsdpBackend
from miles.services.trainer.backends.fsdp.model.sharded_model import full_tensor
from miles.types import SampleGroup

pytestmark = pytest.mark.usefixtures("process_group")

PPO: dict[str, Any] = {"advantage_estimator": "ppo", "gamma": 0.97, "lambd": 0.9}
# A step of Adam with a large epsilon is proportional to the gradient, so that weights after it show the gradient.
GRADIENT_STEP: dict[str, Any] = {"adam_eps": 1.0, "lr": 1.0, "clip_grad": 0.0}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_dense_model(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Another backbone of the same shape, with a value head."""
    folder = write_dense_model(tmp_path_factory.mktemp("reward") / "model")
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    weights = {name: w + 0.05 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    weights["score.weight"] = 0.3 * torch.randn(1, 32, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def loaded(model: pathlib.Path, checkpoints: pathlib.Path | None = None, **changes: Any) -> FsdpBackend:
    config = job_config(model, **PPO, **changes)
    backend = FsdpBackend(config, checkpoints or model / "checkpoints", torch.device("cpu"))
    backend.load()
    return backend


def train(backend: FsdpBackend, groups: list[SampleGroup], step: int = 0) -> dict[str, float]:
    return dict(backend.train(step, groups, lambda progress: None))


def critic_weights(backend: FsdpBackend) -> dict[str, torch.Tensor]:
    critic = backend._loaded.roles.critic
    assert critic is not None
    return {name: full_tensor(p).clone() for name, p in critic.model.named_parameters()}


def policy_weights(backend: FsdpBackend) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in backend.export()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=tolerance, atol=tolerance, msg=name)


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return any(not before[name].equal(after[name]) for name in before)


class StockCritic(torch.nn.Module):
    """The stock backbone and a linear head, sample by sample."""

    def __init__(self, folder: pathlib.Path) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model
        self.head = torch.nn.Parameter(load_file(folder / "model.safetensors")["score.weight"])

    def values(self, tokens: np.ndarray, prompt_length: int) -> torch.Tensor:
        """Of each response token, at the row that predicts it."""
        hidden = self.model(torch.from_numpy(tokens.astype(np.int64))[None, :-1]).last_hidden_state[0]
        return (hidden @ self.head[0])[prompt_length - 1 :]


def gae(values: list[float], kls: list[float], reward: float, kl_coef: float = 0.0) -> list[float]:
    """Advantages of one sample without masked tokens, from the last token back."""
    advantages: list[float] = []
    following = 0.0
    for t in reversed(range(len(values))):
        last = t == len(values) - 1
        gained = -kl_coef * kls[t] + (reward if last else 0.0)
        delta = gained + (0.0 if last else PPO["gamma"] * values[t + 1]) - values[t]
        following = delta + PPO["gamma"] * PPO["lambd"] * following
        advantages.insert(0, following)
    return advantages


@pytest.mark.parametrize("share", [True, False])
def test_advantages_and_the_critics_step_are_those_of_a_straight_line_computation(
    dense: pathlib.Path, reward_model: pathlib.Path, share: bool
) -> None:
    groups = random_groups(21)
    backend = loaded(dense, **GRADIENT_STEP, critic_load=str(reward_model), share_prompts=share)
    metrics, known = train_recorded(backend._loaded.trainer, groups)

    stock = StockCritic(reward_model)
    samples = [sample for group in groups for sample in group.samples]
    total = 0.0
    for sample in samples:
        values = stock.values(sample.tokens, sample.prompt_length)
        advantages = gae(values.tolist(), [0.0] * len(values), float(sample.reward))
        np.testing.assert_allclose(known[sample.group_id, sample.index].advantages, advantages, atol=2e-5)
        returns = torch.tensor(advantages) + values.detach()
        loss = (values - returns).square().mean() / len(samples)
        loss.backward()
        total += loss.item()
    assert metrics["train/value_loss"] == pytest.approx(total, rel=1e-5)
    assert metrics["train/value_clipfrac"] == 0
    step = {
        "lm_head.weight" if name == "head" else name: (p - p.grad / (p.grad.abs() + 1.0)).detach()
        for name, p in stock.named_parameters()
    }
    assert_same(critic_weights(backend), step, 2e-5)


def test_the_kl_to_the_reference_goes_into_the_reward(dense: pathlib.Path) -> None:
    backend = loaded(dense, kl_coef=0.5, critic_lr=0.0)
    train(backend, random_groups(22))
    groups = random_groups(23)
    _, known = train_recorded(backend._loaded.trainer, groups, 1)  # now the policy has left the reference
    samples = [sample for group in groups for sample in group.samples]
    for sample, reference in zip(samples, hf_log_probs(dense, groups, 1.0), strict=True):
        numbers = known[sample.group_id, sample.index]
        kls = (numbers.train_log_probs - reference).tolist()
        assert max(map(abs, kls)) > 0.01
        expected = gae([0.0] * len(kls), kls, float(sample.reward), 0.5)
        np.testing.assert_allclose(numbers.advantages, expected, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dynamic_batch_size": False, "max_tokens_per_gpu": None, "micro_batch_size": 2},
        {"max_tokens_per_gpu": 4096},
        {"gradient_checkpointing": True},
        {"share_prompts": False},
    ],
)
def test_how_the_work_is_cut_does_not_change_what_the_critic_learns(
    dense: pathlib.Path, reward_model: pathlib.Path, changes: dict[str, Any]
) -> None:
    results = []
    for each in ({}, changes):
        backend = loaded(dense, **GRADIENT_STEP, critic_load=str(reward_model), num_steps_per_rollout=2, **each)
        train(backend, random_groups(24))
        results.append(critic_weights(backend))
    assert_same(*results, 2e-5)


def test_warm_up_trains_the_critic_alone(dense: pathlib.Path) -> None:
    backend = loaded(dense, num_critic_only_steps=2, critic_lr=2e-3, critic_lr_warmup_iters=2)
    policy, critic = policy_weights(backend), critic_weights(backend)
    warm = [train(backend, random_groups(25 + step), step) for step in range(2)]
    assert not moved(policy, policy_weights(backend))
    assert moved(critic, critic_weights(backend))
    assert [metrics["train/critic_lr"] for metrics in warm] == pytest.approx([1e-3, 2e-3])
    assert all("train/lr" not in metrics and "train/pg_loss" not in metrics for metrics in warm)
    metrics = train(backend, random_groups(27), 2)
    assert metrics["train/lr"] == 1e-2
    assert metrics["train/ppo_kl"] == 0
    assert moved(policy, policy_weights(backend))


def test_values_are_clipped_around_those_before_the_first_step(dense: pathlib.Path) -> None:
    changes = {"num_steps_per_rollout": 2, "critic_lr": 0.3, "value_clip": 1e-3}
    metrics = train(loaded(dense, **changes), random_groups(28))
    assert metrics["train/value_clipfrac"] == pytest.approx(0.5, abs=0.1)  # all of the second step, none of the first
    metrics = train(loaded(dense, **changes | {"value_clip": 1e3}), random_groups(28))
    assert metrics["train/value_clipfrac"] == 0


def test_a_critic_of_a_mixture_of_experts_routes_for_itself(tmp_path: pathlib.Path) -> None:
    backend = loaded(write_moe_model(tmp_path / "moe"), use_rollout_routing_replay=True)
    metrics = train(backend, random_groups(29, routing=(8, 2, 2)))
    assert metrics["train/routing_difference"] > 0.5
    assert metrics["train/critic_grad_norm"] > 0


def test_a_resumed_run_goes_on_bit_for_bit(dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    changes = {"num_critic_only_steps": 1, "num_steps_per_rollout": 2, "kl_coef": 0.1, "critic_lr_warmup_iters": 6}
    config = job_config(dense, **PPO, **changes)
    first = FsdpBackend(config, tmp_path, torch.device("cpu"))
    state = first.load()
    for step in range(2):
        state.finish_step(train(first, random_groups(step), step))
    first.save(tmp_path / folder_name(2), state)
    lost = train(first, random_groups(2), 2)
    second = FsdpBackend(config, tmp_path, torch.device("cpu"))
    assert second.load() == state
    again = train(second, random_groups(2), 2)
    timeless = {name for name in lost if not name.startswith("perf/")}
    assert {name: again[name] for name in timeless} == {name: lost[name] for name in timeless}
    assert_same(critic_weights(first), critic_weights(second), 0)
    assert_same(policy_weights(first), policy_weights(second), 0)


def test_saving_during_the_warm_up_does_not_count_as_a_step_of_the_policy(
    dense: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    results = []
    for saves in (False, True):
        backend = FsdpBackend(job_config(dense, **PPO, num_critic_only_steps=1), tmp_path, torch.device("cpu"))
        state = backend.load()
        state.finish_step(train(backend, random_groups(30)))
        if saves:
            backend.save(tmp_path / folder_name(1), state)
        train(backend, random_groups(31), 1)
        results.append(policy_weights(backend))
    assert_same(*results, 0)


def test_a_checkpoint_without_a_critic_starts_one(dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    grpo = FsdpBackend(job_config(dense), tmp_path, torch.device("cpu"))
    state = grpo.load()
    state.finish_step(train(grpo, random_groups(1)))
    grpo.save(tmp_path / folder_name(1), state)
    backend = loaded(dense, tmp_path)
    assert not moved(policy_weights(grpo), policy_weights(backend))
    assert train(backend, random_groups(2), 1)["train/value_loss"] > 0


def test_a_head_of_several_rows_is_refused(dense: pathlib.Path, reward_model: pathlib.Path) -> None:
    folder = write_dense_model(reward_model.parent / "classes")
    weights = load_file(folder / "model.safetensors") | {"score.weight": torch.zeros(3, 32)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"shape \(3, 32\), but a critic's head is one row of 32"):
        loaded(dense, critic_load=str(folder))
