"""Padded micro-batches (qkv_format bshd) train as packed ones do."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
from megatron_kit import needs_megatron, run_cases
from megatron_models import EXPERTS, TOP_K, write_model
from safetensors.torch import load_file

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600), needs_megatron]

MOE_LAYERS = {"Qwen3-MoE": 4, "DeepSeek-V3": 3, "MiniMax-M2": 4}
LAYOUTS: dict[str, dict[str, Any]] = {
    "sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp": {"pipeline_model_parallel_size": 2},
}


def case(name: str, model: pathlib.Path, **flags: Any) -> dict[str, Any]:
    """Micro-batches of four samples, or by tokens; experts are replayed."""
    settings = {"train_backend": "megatron", "adam_eps": 1e-3, **flags}
    if not settings.get("max_tokens_per_gpu"):
        settings |= {"use_dynamic_batch_size": False, "max_tokens_per_gpu": None, "micro_batch_size": 4}
    layers = MOE_LAYERS.get(model.name)
    settings |= {"use_rollout_routing_replay": True} if layers else {}
    routing = [EXPERTS, layers, TOP_K] if layers else None
    return {"name": name, "model": str(model), "flags": settings, "routing": routing, "steps": 1}


def assert_alike(out: pathlib.Path, packed: str, padded: str) -> None:
    metrics = [json.loads((out / f"{name}.json").read_text())["metrics"][0] for name in (packed, padded)]
    for key in ("train/loss", "train/grad_norm", "train/train_rollout_logprob_abs_diff"):
        assert metrics[0][key] == pytest.approx(metrics[1][key], rel=2e-5, abs=2e-6), key
    weights = [load_file(out / f"{name}.safetensors") for name in (packed, padded)]
    for key, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][key], rtol=1e-5, atol=5e-6, msg=f"{padded} {key}")


def test_padded_and_packed_samples_train_alike(tmp_path: pathlib.Path) -> None:
    model = write_model("Qwen3-MoE", tmp_path / "Qwen3-MoE")
    padded = {"qkv_format": "bshd"}
    cases = [case("packed", model), case("padded", model, **padded)]
    run_cases([*cases, case("by tokens", model, max_tokens_per_gpu=64, **padded)], tmp_path)
    assert_alike(tmp_path, "packed", "padded")
    assert_alike(tmp_path, "packed", "by tokens")


@pytest.mark.slow
def test_other_families_layouts_and_the_critic(tmp_path: pathlib.Path) -> None:
    models = [write_model(name, tmp_path / name) for name in ("Llama", "DeepSeek-V3", "MiniMax-M2", "Gemma 2")]
    padded = {"qkv_format": "bshd"}
    ppo = {"advantage_estimator": "ppo", "critic_lr": 0.02}
    alone = [case(f"{m.name} {kind}", m, qkv_format=kind) for m in models for kind in ("thd", "bshd")]
    alone += [case("ppo thd", models[0], **ppo), case("ppo bshd", models[0], **ppo, **padded)]
    run_cases(alone, tmp_path)
    split = [
        case(f"{m.name} {name}", m, **padded, **layout)
        for m in models
        for name, layout in LAYOUTS.items()
        if not (m.name == "DeepSeek-V3" and name == "sp")  # local layers do not split it
    ]
    run_cases(split, tmp_path, ranks=2)
    assert_alike(tmp_path, "ppo thd", "ppo bshd")
    for each in [*alone[1:-2:2], *split]:
        assert_alike(tmp_path, f"{pathlib.Path(each['model']).name} thd", each["name"])
