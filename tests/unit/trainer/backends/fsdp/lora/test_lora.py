"""Adapters in the FSDP backend on one rank: what is trained, exported, saved, and what the reference is."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.nn.functional import linear
from trainer_cases import job_config, random_groups, write_dense_model, write_moe_model

from miles.checkpoint_folder import folder_name
from miles.services.rollout.engines.checkpoint_weights import read_weights
from miles.services.trainer.backends.fsdp.backend import FsdpBackend
from miles.services.trainer.backends.fsdp.learner import local_weights
from miles.services.trainer.backends.fsdp.lora.layers import LoraLinear, select_layers
from miles.services.trainer.checkpoint.state import TrainerState
from miles.weights.adapters import lora, peft_folder

pytestmark = pytest.mark.usefixtures("process_group")

RANK = 4
ATTENTION = "q_proj,k_proj,v_proj,o_proj"
KL: dict[str, Any] = {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k3"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_dense_model(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_moe_model(tmp_path_factory.mktemp("moe"))


def loaded(model: pathlib.Path, checkpoints: pathlib.Path | None = None, **changes: Any) -> FsdpBackend:
    config = job_config(model, **{"lora_rank": RANK, **changes})
    backend = FsdpBackend(config, checkpoints or model / "none", torch.device("cpu"))
    backend.load()
    return backend


def trained(model: pathlib.Path, steps: int = 2, **changes: Any) -> FsdpBackend:
    backend = loaded(model, **changes)
    for step in range(steps):
        backend.train(step, random_groups(step), lambda progress: None)
    return backend


def exported(backend: FsdpBackend) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in backend.export()}


def merged(model: pathlib.Path, adapter: dict[str, torch.Tensor], dtype: str = "float32") -> dict[str, torch.Tensor]:
    """What an engine makes of it."""
    weights = read_weights(str(model), dtype)
    for name in lora.adapted_weights(adapter):
        a_RI, b_OR = (adapter[part] for part in lora.adapter_names(name))
        weights[name] = lora.merged(weights[name], a_RI, b_OR, 16 / RANK)
    return weights


def log_probs(model: pathlib.Path, weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Of each token of [T] after the first, by the stock model with these weights; float32 [T - 1]."""
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    stock.load_state_dict(weights, strict=False)
    with torch.no_grad():
        return stock(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layers_gradients_are_those_of_the_merged_weight(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = LoraLinear(torch.nn.Linear(12, 20), RANK, 0.5, generator).to(dtype)
    torch.nn.init.normal_(layer.lora_B.weight, generator=generator)
    x = torch.randn(2, 7, 12, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(2, 7, 20, generator=generator).to(dtype)
    layer(x).backward(grad)
    found = [x.grad, layer.lora_A.weight.grad, layer.lora_B.weight.grad]
    a, b, y = (t.detach().double().requires_grad_() for t in (layer.lora_A.weight, layer.lora_B.weight, x))
    weight = layer.weight.double() + 0.5 * (b @ a)
    linear(y, weight, layer.bias.double()).backward(grad.double())
    for ours, exact in zip(found, (y.grad, a.grad, b.grad), strict=True):
        assert ours is not None
        assert exact is not None
        error = (ours.double() - exact).norm() / exact.norm()
        assert error < (1e-6 if dtype is torch.float32 else 1e-2)
    assert layer.weight.grad is None


def test_only_the_adapter_is_trained_and_exported(dense: pathlib.Path) -> None:
    backend = loaded(dense)
    before = exported(backend)
    assert [(name, t.dtype, tuple(t.shape)) for name, t in before.items()] == list(backend.export_layout())
    assert len(before) == 2 * 3 * 7  # three layers of seven matrices; the head is not one of them
    assert all(name.startswith("base_model.model.model.layers.") for name in before)
    assert all(not t.any() for name, t in before.items() if "lora_B" in name)
    metrics = backend.train(0, random_groups(0), lambda progress: None)
    assert metrics["train/grad_norm"] > 0
    after = exported(backend)
    assert all(not torch.equal(after[name], before[name]) for name in after if "lora_B" in name)
    assert backend.lora is not None
    assert (backend.lora.rank, backend.lora.alpha) == (RANK, 16)
    weights = read_weights(str(dense), "float32")
    assert backend.lora.base_checksum == lora.base_checksum(weights.items(), torch.float32)


def test_an_untrained_adapter_leaves_the_policy_as_it_was(dense: pathlib.Path) -> None:
    plain = FsdpBackend(job_config(dense), dense / "none", torch.device("cpu"))
    plain.load()
    name = "train/train_rollout_logprob_abs_diff"
    groups = random_groups(1)
    assert trained_metric(loaded(dense), groups, name) == trained_metric(plain, groups, name)


def trained_metric(backend: FsdpBackend, groups: Any, name: str) -> float:
    return backend.train(0, groups, lambda progress: None)[name]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_trainer_computes_with_what_an_engine_merges(
    dense: pathlib.Path, tmp_path: pathlib.Path, dtype: str
) -> None:
    backend = trained(dense, train_dtype=dtype, rollout_dtype=dtype)
    adapter = exported(backend)
    backend.save_hf(tmp_path / "hf")
    saved = read_weights(str(tmp_path / "hf"), dtype)
    expected = merged(dense, adapter, dtype)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    if dtype == "float32":
        groups = random_groups(5)
        for sample in (sample for group in groups for sample in group.samples):
            tokens = torch.from_numpy(sample.tokens.astype("int64"))
            sample.rollout_log_probs = log_probs(dense, expected, tokens)[sample.prompt_length - 1 :].numpy()
        assert trained_metric(backend, groups, "train/train_rollout_logprob_abs_diff") < 2e-6


def test_a_peft_folder_holds_the_adapter_and_training_goes_on_from_it(
    dense: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    backend = trained(dense, target_modules=ATTENTION)
    backend.save_hf(tmp_path / "hf")
    folder = tmp_path / "hf" / "adapter"
    tensors = load_file(folder / "adapter_model.safetensors")
    now = exported(backend)
    assert tensors.keys() == now.keys()
    assert all(torch.equal(tensors[name], now[name]) for name in now)
    onward = loaded(dense, lora_adapter_path=str(folder))
    assert all(torch.equal(tensor, now[name]) for name, tensor in exported(onward).items())
    with pytest.raises(ValueError, match="rank 4 and alpha 16"):
        loaded(dense, lora_adapter_path=str(folder), lora_alpha=32)
    with pytest.raises(ValueError, match="belongs to no adapted layer"):
        loaded(dense, lora_adapter_path=str(folder), target_modules="q_proj")


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"max_tokens_per_gpu": 4096}])
def test_how_the_work_is_cut_does_not_change_the_gradient(dense: pathlib.Path, changes: dict[str, Any]) -> None:
    step = {"adam_eps": 1.0, "lr": 1.0, "clip_grad": 0.0, "share_prompts": False}
    one, other = (exported(trained(dense, 1, **{**step, **more})) for more in ({}, changes))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_reference_is_the_base_without_another_copy(dense: pathlib.Path) -> None:
    backend = loaded(dense, **KL)
    kls = [backend.train(step, random_groups(step), lambda p: None)["train/kl_loss"] for step in range(2)]
    assert kls[0] == 0
    assert kls[1] > 0
    moved = FsdpBackend(job_config(dense, **KL), dense / "none", torch.device("cpu"))
    moved.load()
    parts = backend._loaded
    assert parts.roles.reference is not None
    assert parts.roles.reference.model is parts.policy
    assert sum(p.numel() for p in parts.policy.parameters() if not p.requires_grad) == sum(
        p.numel() for p in moved._loaded.policy.parameters()
    )


def test_the_reference_stays_the_base_as_the_adapter_changes(dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The KL is that of a whole policy with the same weights to a reference model of its own."""
    adapted = trained(dense, 1, **KL)
    adapted.save_hf(tmp_path / "hf")
    whole = loaded(tmp_path / "hf", lora_rank=0, ref_load=str(dense), **KL)
    groups = random_groups(4)
    kl = trained_metric(adapted, groups, "train/kl_loss")
    assert kl > 0
    assert kl == pytest.approx(trained_metric(whole, groups, "train/kl_loss"), rel=1e-4)


def test_a_checkpoint_holds_the_adapter_alone_and_resumes_bit_for_bit(
    dense: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = job_config(dense, lora_rank=RANK, num_steps_per_rollout=2, **KL)
    first = FsdpBackend(config, tmp_path / "checkpoints", torch.device("cpu"))
    state = first.load()
    for step in range(2):
        state.finish_step(dict(first.train(step, random_groups(step), lambda progress: None)))
    directory = tmp_path / "checkpoints" / folder_name(2)
    first.save(directory, state)
    saved = FileSystemReader(directory).read_metadata().state_dict_metadata
    adapted = {name for name in saved if "lora_A.weight" in name or "lora_B.weight" in name}
    assert {name.partition(".")[0] for name in saved.keys() - adapted} == {"random_0", "optimizer"}
    assert len(adapted) >= 3 * len(exported(first))  # with two moments of each
    lost = first.train(2, random_groups(2), lambda progress: None)
    second = FsdpBackend(config, tmp_path / "checkpoints", torch.device("cpu"))
    assert second.load() == state
    again = second.train(2, random_groups(2), lambda progress: None)
    assert {k: v for k, v in again.items() if k.startswith("train/")} == {
        k: v for k, v in lost.items() if k.startswith("train/")
    }
    assert all(torch.equal(tensor, exported(first)[name]) for name, tensor in exported(second).items())


def test_old_policies_are_kept_as_adapters(dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    changes = {"keep_old_actor": True, "max_weight_staleness": 1}
    backend = loaded(dense, **changes)
    groups = random_groups(1)
    backend.train(0, random_groups(0), lambda progress: None)
    old_policies = backend._loaded.roles.old_policies
    assert old_policies is not None
    assert {name.split(".")[-2] for name in old_policies.copies[0].tensors} == {"lora_A", "lora_B"}
    backend.save(tmp_path / folder_name(1), TrainerState(step=1))
    resumed = loaded(dense, tmp_path, **changes)
    metrics, again = (dict(each.train(1, groups, lambda progress: None)) for each in (backend, resumed))
    for name in ("train/ppo_kl", "train/loss", "train/grad_norm"):
        assert metrics[name] == again[name]
    assert metrics["train/ppo_kl"] != 0  # the samples are of version 0


def test_a_critic_beside_an_adapter_resumes_from_a_checkpoint_that_was_written_while_they_learned(
    dense: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    changes = {"advantage_estimator": "ppo", "kl_coef": 0.1, "keep_old_actor": True, "max_weight_staleness": 1}
    config = job_config(dense, lora_rank=RANK, num_critic_only_steps=1, async_save=True, **changes)
    first = FsdpBackend(config, tmp_path, torch.device("cpu"))
    state = first.load()
    state.finish_step(dict(first.train(0, random_groups(0), lambda progress: None)))
    exported(first)
    saving = first.begin_save(tmp_path / folder_name(1), state)
    lost = first.train(1, random_groups(1), lambda progress: None)
    saving.finish()
    second = FsdpBackend(config, tmp_path, torch.device("cpu"))
    assert second.load() == state
    again = second.train(1, random_groups(1), lambda progress: None)
    assert {k: v for k, v in again.items() if k.startswith("train/")} == {
        k: v for k, v in lost.items() if k.startswith("train/")
    }
    assert again["train/old_actor_ratio"] == 1  # the samples are of version 0
    assert all(torch.equal(tensor, exported(first)[name]) for name, tensor in exported(second).items())
    first.close()


@pytest.mark.parametrize(("before", "after"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_checkpoint_goes_on_where_another_type_is_faster(
    dense: pathlib.Path, tmp_path: pathlib.Path, before: str, after: str
) -> None:
    """The adapter itself is float32 on both sides."""

    def adapter(backend: FsdpBackend) -> dict[str, torch.Tensor]:
        return dict(local_weights(backend._loaded.policy, trained_only=True))

    saved = trained(dense, train_dtype=before, rollout_dtype=before)
    saved.save(tmp_path / folder_name(2), TrainerState(step=2))
    resumed = loaded(dense, tmp_path, train_dtype=after, rollout_dtype=after)
    assert resumed.loaded_from == tmp_path / folder_name(2)
    kept = adapter(saved)
    assert kept
    assert all(torch.equal(tensor, kept[name]) for name, tensor in adapter(resumed).items())
    resumed.train(2, random_groups(2), lambda progress: None)


def test_a_checkpoint_of_another_base_is_refused(dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    backend = loaded(dense, checkpoints)
    backend.save(checkpoints / folder_name(1), TrainerState(step=1))
    other = write_dense_model(tmp_path / "other", tied=False)
    with pytest.raises(ValueError, match="holds an adapter of base"):
        loaded(other, checkpoints)
    with pytest.raises(ValueError, match="lora_rank 4 → 0"):
        loaded(dense, checkpoints, lora_rank=0)


def test_a_mixture_of_experts_gets_adapters_beside_its_experts(moe: pathlib.Path) -> None:
    backend = trained(moe, use_routing_replay=True, **KL)
    names = lora.adapted_weights(exported(backend))
    assert {name.split(".")[-2] for name in names} == set(ATTENTION.split(","))
    with pytest.raises(ValueError, match=r"experts is a Qwen3MoeExperts; adapters are for linear layers"):
        loaded(moe, target_modules="experts")


@pytest.mark.parametrize(
    ("targets", "excluded", "expected"),
    [
        (["q_proj"], [], {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        (["layers.0.mlp.up_proj"], [], {"model.layers.0.mlp.up_proj"}),
        (["q_proj", "v_proj"], ["layers.1.self_attn.q_proj", "v_proj"], {"model.layers.0.self_attn.q_proj"}),
        (["lm_head"], [], {"lm_head"}),
    ],
)
def test_modules_are_chosen_as_peft_does(targets: list[str], excluded: list[str], expected: set[str]) -> None:
    assert set(select_layers(small_model(tied=False), targets, excluded)) == expected


@pytest.mark.parametrize(
    ("targets", "excluded", "expected"),
    [
        (["proj"], [], "target_modules: proj is no module"),
        (["q_proj"], ["none"], "exclude_modules: none is no module"),
        (["q_proj"], ["q_proj"], "leaves no layer"),
        (["self_attn"], [], "is a LlamaAttention"),
        (["lm_head"], [], "shares its weight with the embedding"),
    ],
)
def test_modules_that_cannot_be_adapted_are_named(targets: list[str], excluded: list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        select_layers(small_model(tied=True), targets, excluded)


def small_model(*, tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )  # fmt: skip


def test_an_adapter_to_start_from_says_which_layers_are_adapted(dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    names = lora.adapter_names("model.layers.1.self_attn.q_proj.weight")
    tensors = dict(zip(names, (torch.randn(RANK, 32), torch.randn(32, RANK)), strict=True))
    peft_folder.write(tmp_path / "adapter", peft_folder.PeftAdapter(RANK, 16, tensors), "base")
    backend = loaded(dense, lora_adapter_path=str(tmp_path / "adapter"))
    assert {name: t.shape for name, t in exported(backend).items()} == {name: t.shape for name, t in tensors.items()}
