"""The megatron backend computes the same in every layout, and the same as the fsdp backend.

Real megatron-core over gloo: all layouts of a number of ranks are walked in one start. Adam's epsilon is large, so that
rounding of tiny gradients does not become steps of full size.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
from megatron_kit import needs_megatron, run_cases
from megatron_models import EXPERTS, TOP_K, write_model
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600), needs_megatron]

MODELS = {"dense": "Llama", "tied": "Llama, tied", "moe": "Qwen3-MoE", "latent": "DeepSeek-V3"}
MOE_LAYERS = {"moe": 4, "latent": 3}
TRAINING = {"adam_eps": 1e-3, "weight_decay": 0.1, "lr_warmup_iters": 1}
REPLAY = {
    "use_rollout_routing_replay": True,
    "use_kl_loss": True,
    "kl_loss_coef": 0.1,
    "entropy_coef": 0.01,
    "num_steps_per_rollout": 2,
}
PPO = {
    "advantage_estimator": "ppo",
    "gamma": 0.97,
    "lambd": 0.9,
    "kl_coef": 0.05,
    "critic_lr": 0.02,
    "num_steps_per_rollout": 2,
    "num_critic_only_steps": 1,
    "normalize_advantages": True,
}
OLD = {"keep_old_actor": True, "max_weight_staleness": 2, "use_opd": True, "opd_type": "megatron"}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

TP2 = {"tensor_model_parallel_size": 2}
SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP = {**PP2, "num_virtual_stages_per_pipeline_rank": 2}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
DP2 = {"use_distributed_optimizer": True}

LAYOUTS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "dense-tp2": (2, "dense", TP2),
    "dense-sp": (2, "dense", SP),
    "dense-pp2": (2, "dense", PP2),
    "dense-vpp": (2, "dense", VPP),
    "dense-dp2": (2, "dense", DP2),
    "dense-cp2": (2, "dense", CP2),
    "tied-pp2": (2, "tied", PP2),
    "moe-ep2": (2, "moe", EP2),
    "replay-sp": (2, "replay", SP),
    "replay-pp2": (2, "replay", PP2),
    "replay-vpp": (2, "replay", {**VPP, **RECOMPUTE}),
    "replay-ep2": (2, "replay", {**EP2, **RECOMPUTE}),
    "replay-cp2": (2, "replay", CP2),
    "latent-pp2": (2, "latent", {**PP2, **RECOMPUTE}),
    "latent-cp2": (2, "latent", CP2),
    "ppo-tp2": (2, "ppo", TP2),
    "ppo-sp": (2, "ppo", SP),
    "ppo-vpp": (2, "ppo", VPP),
    "ppo-dp2": (2, "ppo", DP2),
    "ppo-cp2": (2, "ppo", CP2),
    "old-overlap": (2, "old", {**DP2, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "old-sp": (2, "old", SP),
    "old-pp2": (2, "old", PP2),
    "dense-tp2-pp2": (4, "dense", {**TP2, **PP2}),
    "replay-tp2-pp2": (4, "replay", {**SP, **PP2}),
    "replay-tp2-ep2": (4, "replay", {**SP, **EP2, **DP2}),
}
"""Name: ranks, the case of one process that it must equal, and the layout."""


def case(name: str, base: str, folder: pathlib.Path, **flags: Any) -> dict[str, Any]:
    """What `backend_cases` is to run; `base` is a model, or what is done with one.

    That is replay (of the moe model), ppo (of the tied one), or old: kept old actors and a teacher (the dense one).
    """
    model = {"replay": "moe", "ppo": "tied", "old": "dense"}.get(base, base)
    replays = base in ("replay", "latent")
    routing = [EXPERTS, MOE_LAYERS[model], TOP_K] if replays else None
    training = {
        "ppo": {**PPO, "critic_load": str(folder / "reward")},
        "old": {**OLD, "opd_teacher_load": str(folder / "teacher")},
    }.get(base, {})
    settings = {**TRAINING, "train_backend": "megatron", **(REPLAY if replays else training), **flags}
    old = base == "old"
    return {"name": name, "model": str(folder / model), "flags": settings, "routing": routing, "off_policy": old}


def write_reward_model(folder: pathlib.Path) -> None:
    """A value head in the place of the output layer."""
    write_model(MODELS["dense"], folder, seed=2)
    weights = load_file(folder / "model.safetensors")
    hidden = weights.pop("lm_head.weight").shape[1]
    weights["score.weight"] = torch.randn(1, hidden, generator=torch.Generator().manual_seed(0)) * 0.1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with what every case gave."""
    out = tmp_path_factory.mktemp("layouts")
    for name, family in MODELS.items():
        write_model(family, out / name)
    write_model(MODELS["dense"], out / "teacher", seed=1)
    write_reward_model(out / "reward")
    fsdp = {"train_backend": "fsdp"}
    run_cases(
        [
            case("fsdp-dense", "dense", out, **fsdp),
            case("fsdp-tied", "tied", out, **fsdp),
            case("fsdp-moe", "moe", out, **fsdp),
            case("fsdp-replay", "replay", out, **fsdp, share_prompts=False),
            case("fsdp-ppo", "ppo", out, **fsdp),
            case("fsdp-old", "old", out, **fsdp),
        ],
        out,
        megatron=False,
    )
    run_cases([case(f"fsdp-{base}-dp2", base, out, **fsdp) for base in ("ppo", "old")], out, ranks=2, megatron=False)
    alone = [case(name, name, out) for name in ("dense", "tied", "moe", "replay", "latent", "ppo", "old")]
    for base in ("ppo", "old"):
        alone.append({**case(f"{base}-saved", base, out, **DP2), "save_at": 2})
        alone.append(case(f"{base}-resumed", base, out, **DP2, load=str(out / f"{base}-saved" / "checkpoints")))
    saved = {**case("saved", "moe", out, **DP2), "save_at": 2, "save_hf": True}
    resumed = case("resumed", "moe", out, **DP2, load=str(out / "saved" / "checkpoints"))
    moving = {"use_kl_loss": True, "kl_loss_coef": 0.1, "ref_update_interval": 2, **DP2}
    moved = {**case("moved", "dense", out, **moving), "save_at": 3, "steps": 4}
    removed = {**case("moved-resumed", "dense", out, **moving, load=str(out / "moved" / "checkpoints")), "steps": 4}
    replayed = case("recomputed", "replay", out, **RECOMPUTE)
    run_cases([*alone, replayed, saved, resumed, moved, removed], out)
    for ranks in (2, 4):
        cases = [case(name, base, out, **flags) for name, (n, base, flags) in LAYOUTS.items() if n == ranks]
        if ranks == 2:
            load = str(out / "saved" / "checkpoints")
            cases += [case(f"resumed-{n}", "moe", out, **f, **DP2, load=load) for n, f in RESUMED.items()]
        run_cases(cases, out, ranks=ranks)
    return out


RESUMED = {"sp": SP, "pp2": PP2, "ep2": EP2}


def worst_differences(out: pathlib.Path, left: str, right: str) -> tuple[float, float]:
    """Largest difference of a metric of any step, relative above 1, and of a weight."""
    records = [json.loads((out / f"{name}.json").read_text())["metrics"] for name in (left, right)]
    metrics = [
        abs(a[key] - b[key]) / max(1.0, abs(a[key]))
        for a, b in zip(records[0][-len(records[1]) :], records[1], strict=True)
        for key in a.keys() - {"perf/log_probs_time"}
        if key in b
    ]
    weights = [load_file(out / f"{name}.safetensors") for name in (left, right)]
    assert weights[0].keys() == weights[1].keys()
    return max(metrics), max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])


@pytest.mark.parametrize("base", ["dense", "tied", "moe", "replay", "ppo", "old"])
def test_one_process_trains_as_the_fsdp_backend_does(results: pathlib.Path, base: str) -> None:
    metrics, weights = worst_differences(results, f"fsdp-{base}", base)
    assert metrics < 1e-4
    assert weights < 1e-4


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_as_one_process_does(results: pathlib.Path, name: str) -> None:
    metrics, weights = worst_differences(results, LAYOUTS[name][1], name)
    assert metrics < 1e-5
    assert weights < 1e-5


def test_recomputation_replays_the_same_routing(results: pathlib.Path) -> None:
    assert worst_differences(results, "replay", "recomputed") == (0.0, 0.0)


def test_replay_sends_tokens_elsewhere_and_trains_the_router(results: pathlib.Path) -> None:
    steps = json.loads((results / "replay.json").read_text())["metrics"]
    assert all(step["train/routing_difference"] > 0.8 for step in steps)  # the recorded experts are random
    before = load_file(results / "moe" / "model.safetensors")
    after = load_file(results / "replay.safetensors")
    routers = [name for name in after if name.endswith("mlp.gate.weight")]
    assert len(routers) == 4
    assert all((after[name] - before[name]).abs().max() > 1e-4 for name in routers)


@pytest.mark.parametrize("name", ["dense", "moe", "dense-tp2", "replay-tp2-ep2"])
def test_the_layout_announces_what_is_exported(results: pathlib.Path, name: str) -> None:
    announced = json.loads((results / f"{name}.json").read_text())["layout"]
    weights = load_file(results / f"{name}.safetensors")
    assert sorted(announced) == sorted([n, str(t.dtype), list(t.shape)] for n, t in weights.items())


def test_a_resumed_run_goes_on_bit_for_bit(results: pathlib.Path) -> None:
    assert worst_differences(results, "saved", "resumed") == (0.0, 0.0)


@pytest.mark.parametrize("base", ["ppo", "old"])
def test_two_replicas_of_the_fsdp_backend_train_as_one_does(results: pathlib.Path, base: str) -> None:
    metrics, weights = worst_differences(results, f"fsdp-{base}", f"fsdp-{base}-dp2")
    assert metrics < 1e-5
    assert weights < 1e-5


def test_a_critic_is_resumed_bit_for_bit(results: pathlib.Path) -> None:
    steps = json.loads((results / "ppo.json").read_text())["metrics"]
    assert "train/pg_loss" not in steps[0]  # warm-up
    assert all(step["train/value_loss"] > 0.01 for step in steps)
    assert worst_differences(results, "ppo-saved", "ppo-resumed") == (0.0, 0.0)


def test_old_actors_are_resumed_bit_for_bit(results: pathlib.Path) -> None:
    steps = json.loads((results / "old.json").read_text())["metrics"]
    assert all(0.2 < step["train/old_actor_ratio"] < 0.6 for step in steps[1:])
    assert all(abs(step["train/opd_reverse_kl"]) > 0.01 for step in steps)
    assert worst_differences(results, "old-saved", "old-resumed") == (0.0, 0.0)


def test_a_reference_that_moves_is_resumed_as_it_was(results: pathlib.Path) -> None:
    last = json.loads((results / "moved-resumed.json").read_text())["metrics"][-1]
    assert last["train/kl_loss"] != 0
    assert worst_differences(results, "moved", "moved-resumed") == (0.0, 0.0)


@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_goes_on_in_another_layout(results: pathlib.Path, name: str) -> None:
    metrics, weights = worst_differences(results, "saved", f"resumed-{name}")
    assert metrics < 1e-5
    assert weights < 1e-5


def test_the_hugging_face_folder_has_the_names_and_values_of_the_files(results: pathlib.Path) -> None:
    source, written = (load_file(results / part / "model.safetensors") for part in ("moe", "saved/hf"))
    assert source.keys() == written.keys()
    assert all(source[name].shape == written[name].shape for name in source)
    fused = load_file(results / "saved.safetensors")["model.layers.1.mlp.experts.gate_up_proj"]
    expert = [written[f"model.layers.1.mlp.experts.5.{part}_proj.weight"] for part in ("gate", "up")]
    torch.testing.assert_close(fused[5], torch.cat(expert), rtol=0, atol=0)
    assert (results / "saved/hf/tokenizer.json").is_file()
