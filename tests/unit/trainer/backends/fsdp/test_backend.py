"""The FSDP backend on one rank: log-probabilities, gradients, replayed routing, exports, determinism."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from trainer_cases import (
    hf_log_probs,
    job_config,
    random_groups,
    set_own_routing,
    write_dense_model,
    write_moe_model,
)

from miles.checkpoint_folder import folder_name
from miles.services.trainer.backends.fsdp.backend import FsdpBackend
from miles.types import SampleGroup, SampleStatus

pytestmark = pytest.mark.usefixtures("process_group")

# A step of Adam with a large epsilon is proportional to the gradient, so that weights after it show the gradient.
GRADIENT_STEP: dict[str, Any] = {"adam_eps": 1.0, "lr": 1.0, "clip_grad": 0.0}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_dense_model(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_moe_model(tmp_path_factory.mktemp("moe"))


def loaded(model: pathlib.Path, **changes: Any) -> FsdpBackend:
    backend = FsdpBackend(job_config(model, **changes), model / "checkpoints", torch.device("cpu"))
    backend.load()
    return backend


def train(backend: FsdpBackend, groups: list[SampleGroup], step: int = 0) -> dict[str, float]:
    return dict(backend.train(step, groups, lambda progress: None))


def weights(backend: FsdpBackend) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in backend.export()}


def after_one_step(model: pathlib.Path, groups: list[SampleGroup], **changes: Any) -> dict[str, torch.Tensor]:
    backend = loaded(model, **GRADIENT_STEP, **changes)
    train(backend, groups)
    return weights(backend)


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", ["dense", "moe"])
def test_log_probs_are_those_of_the_stock_model_sample_by_sample(
    family: str, share: bool, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(family)
    groups = random_groups(1)
    for sample, log_probs in zip((s for g in groups for s in g.samples), hf_log_probs(model, groups, 0.7), strict=True):
        sample.rollout_log_probs = log_probs
    metrics = train(loaded(model, share_prompts=share, rollout_temperature=0.7), groups)
    assert metrics["train/train_rollout_logprob_abs_diff"] < 2e-6
    assert metrics["train/ppo_kl"] == 0
    assert metrics["train/pg_clipfrac"] == 0


@pytest.mark.parametrize("family", ["dense", "moe"])
def test_shared_prompts_give_the_gradient_of_separate_ones(family: str, request: pytest.FixtureRequest) -> None:
    model, groups = request.getfixturevalue(family), random_groups(2)
    assert_same(after_one_step(model, groups, share_prompts=True), after_one_step(model, groups, share_prompts=False))


@pytest.mark.parametrize("family", ["dense", "moe"])
def test_responses_that_begin_alike_give_the_gradient_of_separate_ones(
    family: str, request: pytest.FixtureRequest
) -> None:
    model, groups = request.getfixturevalue(family), random_groups(2)
    for first, *others in (group.samples for group in groups):
        for other in others:
            common = min(len(first.tokens), len(other.tokens)) - other.index % 3
            other.tokens[:common] = first.tokens[:common]
    assert_same(after_one_step(model, groups, share_prompts=True), after_one_step(model, groups, share_prompts=False))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dynamic_batch_size": False, "max_tokens_per_gpu": None, "micro_batch_size": 2},
        {"max_tokens_per_gpu": 4096},
        {"gradient_checkpointing": True},
        {"log_probs_chunk_size": 3},
    ],
)
def test_how_the_work_is_cut_does_not_change_the_gradient(dense: pathlib.Path, changes: dict[str, Any]) -> None:
    groups = random_groups(3)
    assert_same(after_one_step(dense, groups), after_one_step(dense, groups, **changes))


def test_the_log_probability_pass_changes_nothing_with_one_step_per_rollout(dense: pathlib.Path) -> None:
    groups = random_groups(4)
    # Rejection needs the pass; with these bounds it rejects nothing.
    bounds = {"rs_lower_bound": 1e-9, "rs_upper_bound": 1e9, "rs_veto_threshold": 0}
    with_pass = after_one_step(dense, groups, use_mis=True, use_rs=True, **bounds)
    assert_same(after_one_step(dense, groups), with_pass, 0)


def test_two_steps_per_rollout_take_their_groups_in_order(dense: pathlib.Path) -> None:
    groups = random_groups(5)
    both = loaded(dense, num_steps_per_rollout=2)
    metrics = train(both, list(reversed(groups)))
    # The old log-probabilities of the second step are those before the first, which here are given by the engine.
    before = hf_log_probs(dense, groups, 1.0)
    for sample, log_probs in zip((s for g in groups for s in g.samples), before, strict=True):
        sample.rollout_log_probs = log_probs
    one_by_one = loaded(dense, rollout_batch_size=2, num_rollout=16, use_rollout_logprobs=True)
    train(one_by_one, groups[:2])
    train(one_by_one, groups[2:], 1)
    assert metrics["train/ppo_kl"] != 0
    assert_same(weights(both), weights(one_by_one), 1e-3)


def test_samples_without_advantage_are_reported_on_and_leave_the_gradient_as_it_is(dense: pathlib.Path) -> None:
    groups = random_groups(13)
    for sample in (*groups[1].samples, *groups[3].samples):
        sample.reward = 1.0
    # An entropy bonus of nearly nothing has every sample trained on.
    everything = after_one_step(dense, groups, entropy_coef=1e-30)
    assert_same(after_one_step(dense, groups), everything, 1e-6)
    skipped, whole = (train(loaded(dense, entropy_coef=coef), groups) for coef in (0.0, 1e-30))
    for name in ("train/train_rollout_logprob_abs_diff", "train/grad_norm", "train/loss"):
        assert skipped[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-7)
    assert skipped["train/grad_norm"] > 0


def test_float16_trains_with_a_scaled_loss(dense: pathlib.Path) -> None:
    groups = random_groups(14)
    half = after_one_step(dense, groups, train_dtype="float16")
    assert_same(half, after_one_step(dense, groups), 1e-2)


def test_failed_and_removed_samples_are_not_trained_on(dense: pathlib.Path) -> None:
    groups = random_groups(6)
    kept = after_one_step(dense, groups)
    for group in groups:
        for sample in group.samples[2:]:
            sample.loss_mask = np.zeros(sample.response_length, np.uint8)
    masked = after_one_step(dense, groups)
    for group in groups:
        for sample in group.samples[2:]:
            sample.loss_mask = None
            sample.remove_sample = True
    removed = after_one_step(dense, groups)
    assert_same(masked, removed, 0)
    assert any(not kept[name].equal(masked[name]) for name in kept)


def test_a_failed_sample_needs_no_reward_and_does_not_shift_its_groups_mean(dense: pathlib.Path) -> None:
    groups = random_groups(7)
    for sample, reward in zip(groups[0].samples, (1.0, 1.0, 1.0, None), strict=True):
        sample.reward = reward
    groups[0].samples[3].status = SampleStatus.FAILED
    groups[1:] = [SampleGroup("job", g.group_id, g.samples) for g in groups[1:]]
    for group in groups[1:]:
        for sample in group.samples:
            sample.reward = 0.5
    metrics = train(loaded(dense), groups)
    assert metrics["train/grad_norm"] == 0


def test_a_rollout_of_the_wrong_size_is_refused(dense: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="hold 12 samples"):
        train(loaded(dense), random_groups(1, range(3)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_replayed_routing_decides_forward_recompute_and_backward(moe: pathlib.Path, checkpointing: bool) -> None:
    groups = random_groups(8, routing=(8, 2, 2))
    changes = {"gradient_checkpointing": checkpointing, "share_prompts": False}
    replayed = after_one_step(moe, groups, use_rollout_routing_replay=True, **changes)
    before = weights(loaded(moe))
    gates = [name for name in before if name.endswith("mlp.gate.weight")]
    assert len(gates) == 2
    assert all(not replayed[name].equal(before[name]) for name in gates)
    assert_same(replayed, reference_step_with_routing(moe, groups), 2e-5)


def test_replay_of_the_models_own_routing_changes_nothing(moe: pathlib.Path) -> None:
    groups = random_groups(9)
    free = after_one_step(moe, groups)
    set_own_routing(moe, groups)
    assert_same(free, after_one_step(moe, groups, use_rollout_routing_replay=True), 1e-6)
    assert_same(free, after_one_step(moe, groups, use_routing_replay=True), 0)
    assert_same(free, after_one_step(moe, groups, use_routing_replay=True, gradient_checkpointing=True), 0)


def test_recorded_routing_holds_over_all_steps_of_a_rollout(moe: pathlib.Path) -> None:
    groups = random_groups(10)
    set_own_routing(moe, groups)  # what the log-probability pass before the first step will choose
    recorded = after_one_step(moe, groups, use_routing_replay=True, num_steps_per_rollout=4, share_prompts=False)
    rolled_out = after_one_step(
        moe, groups, use_rollout_routing_replay=True, num_steps_per_rollout=4, share_prompts=False
    )
    free = after_one_step(moe, groups, num_steps_per_rollout=4, share_prompts=False)
    assert_same(recorded, rolled_out, 1e-6)
    assert any(not free[name].equal(recorded[name]) for name in free)


def test_replay_without_the_engines_routing_names_the_sample(moe: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"of group .* has no rollout_routed_experts"):
        train(loaded(moe, use_rollout_routing_replay=True), random_groups(1))
    with pytest.raises(ValueError, match="routing of 3 layers"):
        train(loaded(moe, use_rollout_routing_replay=True), random_groups(1, routing=(8, 3, 2)))


def test_a_dense_model_has_no_routing_to_replay(dense: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="has no router whose choice"):
        loaded(dense, use_routing_replay=True)


@pytest.mark.parametrize("family", ["dense", "moe"])
def test_an_export_has_the_names_and_shapes_of_the_stock_model(family: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoModelForCausalLM

    model = request.getfixturevalue(family)
    backend = loaded(model, rollout_dtype="bfloat16")
    layout = backend.export_layout()
    types = {name: dtype for name, dtype, _ in layout}
    held = weights(backend)
    assert [(name, tuple(t.shape)) for name, t in held.items()] == [(name, shape) for name, _, shape in layout]
    exported = {name: tensor.to(types[name]) for name, tensor in held.items()}  # as transports convert them
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    missing, unexpected = stock.load_state_dict(exported, strict=False)
    assert not unexpected
    assert missing in ([], ["lm_head.weight"])
    named = dict(stock.named_parameters())
    assert set(exported) == set(named)
    assert all(exported[name].equal(named[name].to(torch.bfloat16)) for name in exported)


@pytest.mark.parametrize("family", ["dense", "moe"])
def test_a_hugging_face_export_loads_as_the_trained_model(
    family: str, tmp_path: pathlib.Path, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    backend = loaded(request.getfixturevalue(family))
    train(backend, random_groups(11))
    backend.save_hf(tmp_path / "hf")
    stock = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "hf").named_parameters())
    assert all(tensor.equal(stock[name]) for name, tensor in backend.export())
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").encode("w5 w6") == [5, 6]


def test_the_reference_gives_a_kl_of_zero_at_first_and_moves_on_request(dense: pathlib.Path) -> None:
    changes = {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k3", "ref_update_interval": 2}
    backend = loaded(dense, **changes)
    kls = [train(backend, random_groups(step), step)["train/kl_loss"] for step in range(3)]
    assert kls[0] == 0
    assert kls[1] > 0
    assert kls[2] == 0


def test_a_checkpoint_brings_back_a_reference_that_moved(dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    changes = {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k3", "ref_update_interval": 2}
    config = job_config(dense, **changes)
    first = FsdpBackend(config, tmp_path, torch.device("cpu"))
    state = first.load()
    for step in range(3):
        state.finish_step(train(first, random_groups(step), step))
    first.save(tmp_path / folder_name(3), state)
    lost = train(first, random_groups(3), 3)
    second = FsdpBackend(config, tmp_path, torch.device("cpu"))
    assert second.load() == state
    again = train(second, random_groups(3), 3)
    assert {k: v for k, v in again.items() if k.startswith("train/")} == {
        k: v for k, v in lost.items() if k.startswith("train/")
    }
    assert_same(weights(first), weights(second), 0)


def test_a_run_resumed_with_a_reference_that_moves_starts_from_the_one_it_had(
    dense: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    kl = {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k3"}
    fixed = FsdpBackend(job_config(dense, **kl), tmp_path, torch.device("cpu"))
    state = fixed.load()
    state.finish_step(train(fixed, random_groups(0), 0))
    fixed.save(tmp_path / folder_name(1), state)
    expected = train(fixed, random_groups(1), 1)["train/kl_loss"]
    moving = FsdpBackend(job_config(dense, **kl, ref_update_interval=2), tmp_path, torch.device("cpu"))
    assert moving.load() == state
    assert train(moving, random_groups(1), 1)["train/kl_loss"] == expected > 0
    assert train(moving, random_groups(2), 2)["train/kl_loss"] == 0


def test_training_is_the_same_bit_for_bit_when_repeated_with_two_threads(dense: pathlib.Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = []
        for _ in range(2):
            backend = loaded(dense, train_dtype="bfloat16")
            for step in range(3):
                train(backend, random_groups(step), step)
            runs.append(weights(backend))
    finally:
        torch.set_num_threads(threads)
    assert_same(runs[0], runs[1], 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"advantage_estimator": "gspo", "observe_training_entropy": True},
        {"advantage_estimator": "reinforce_plus_plus", "kl_coef": 0.05},
        {"advantage_estimator": "dr_grpo", "use_opsm": True, "num_steps_per_rollout": 2},
        {"advantage_estimator": "cispo", "use_tis": True, "num_steps_per_rollout": 2},
        {"advantage_estimator": "rloo", "use_icepop": True, "calculate_per_token_loss": True},
        {"use_mis": True, "use_tis": True, "use_rs": True, "get_mismatch_metrics": True, "entropy_coef": 0.01},
        {"use_rollout_logprobs": True, "normalize_advantages": True},
    ],
)
def test_every_combination_of_losses_trains_to_finite_numbers(dense: pathlib.Path, changes: dict[str, Any]) -> None:
    metrics = train(loaded(dense, **changes), random_groups(12))
    assert metrics["train/grad_norm"] > 0
    assert all(np.isfinite(value) for value in metrics.values())


def reference_step_with_routing(model: pathlib.Path, groups: list[SampleGroup]) -> dict[str, torch.Tensor]:
    """The same GRPO step with the stock model, sample by sample, its routers replaced by an explicit computation."""
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    samples = [sample for group in groups for sample in group.samples]
    for group in groups:
        rewards = torch.tensor([sample.reward for sample in group.samples], dtype=torch.float64)
        spread = rewards.std() + 1e-6 if rewards.std() > 0 else 1.0
        advantages = ((rewards - rewards.mean()) / spread).float()
        for sample, advantage in zip(group.samples, advantages, strict=True):
            tokens = torch.from_numpy(sample.tokens.astype(np.int64))
            handles = [
                layer.mlp.gate.register_forward_hook(chosen(torch.from_numpy(sample.rollout_routed_experts[:, i])))
                for i, layer in enumerate(stock.model.layers)
            ]
            log_probs = stock(tokens[None, :-1]).logits[0].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
            new = log_probs[sample.prompt_length - 1 :]
            (-(new - new.detach()).exp() * advantage).mean().div(len(samples)).backward()
            for handle in handles:
                handle.remove()
    return {
        name: (p - p.grad / (p.grad.abs() + 1.0)).detach()  # one step of Adam with lr and eps of 1
        for name, p in stock.named_parameters()
    }


def chosen(experts: torch.Tensor) -> Any:
    def replace(module: Any, args: Any, output: Any) -> Any:
        probabilities = output[0].softmax(-1)
        picked = torch.stack([probabilities[row, experts[row].long()] for row in range(len(experts))])
        return output[0], picked / picked.sum(-1, keepdim=True), experts.long()

    return replace
