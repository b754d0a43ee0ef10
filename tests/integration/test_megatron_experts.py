"""Settings of mixture-of-experts layers in the megatron backend: what balances experts, and routers' types.

Losses are compared with their formulas, over all rows of a rollout that has no other gradient.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from megatron_kit import needs_megatron, run_cases
from megatron_models import EXPERTS, TOP_K, write_model
from safetensors.torch import load_file
from trainer_cases import random_groups

pytestmark = [pytest.mark.engine, needs_megatron]

COEFFICIENT = 0.5
RATE = 0.25
REPLAY = {"use_rollout_routing_replay": True}
HALF = {"train_dtype": "bfloat16", "lr": 1.0, "adam_eps": 1.0, "clip_grad": 0.0}
"""One step of Adam with a large epsilon, which is proportional to the gradient."""
BIASED_LAYERS = (1, 2, 3)
ROUTING = [EXPERTS, len(BIASED_LAYERS), TOP_K]
MOVING = {**REPLAY, "moe_router_bias_update_rate": RATE, "max_tokens_per_gpu": 64}


def case(name: str, model: pathlib.Path, **flags: Any) -> dict[str, Any]:
    """One step, with one micro-batch unless flags say otherwise."""
    settings = {"train_backend": "megatron", "max_tokens_per_gpu": 1024, **flags}
    return {"name": name, "model": str(model), "flags": settings, "steps": 1}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with what every case gave."""
    out = tmp_path_factory.mktemp("experts")
    model, biased = write_model("Qwen3-MoE", out / "model"), write_model("GLM-4.5", out / "biased")
    balance, alike = {"moe_aux_loss_coeff": COEFFICIENT}, {"reward": 1.0}
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    run_cases(
        [
            {**case("balance", model, **balance), **alike},
            {**case("replayed-balance", model, **balance, **REPLAY), **alike, "own_routing": True, "divert_every": 0},
            {**case("z", model, moe_z_loss_coeff=COEFFICIENT), **alike},
            case("frozen", model, moe_router_freeze_gate=True),
            *(case(f"scores-{dtype}", model, **HALF, moe_router_dtype=dtype) for dtype in ("fp32", "fp64", "none")),
            {**case("moved-recomputed", biased, **MOVING, **recompute), "routing": ROUTING, "abandon_at": 2},
            case("kept", biased),
        ],
        out,
    )
    return out


@pytest.fixture(scope="module")
def more_results(results: pathlib.Path) -> pathlib.Path:
    """The same folder with what two replicas gave."""
    run_cases(
        [
            {**case("z-dp2", results / "model", moe_z_loss_coeff=COEFFICIENT), "reward": 1.0},
            {**case("moved-dp2", results / "biased", **MOVING), "routing": ROUTING},
        ],
        results,
        ranks=2,
    )
    return results


def metrics_of(out: pathlib.Path, name: str) -> dict[str, float]:
    (metrics,) = json.loads((out / f"{name}.json").read_text())["metrics"]
    return dict(metrics)


def largest_difference(out: pathlib.Path, left: str, right: str) -> float:
    weights = [load_file(out / f"{name}.safetensors") for name in (left, right)]
    return max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])


def balance(logits_TE: torch.Tensor) -> torch.Tensor:
    """Experts × the sum of (share of choices × mean probability) (Switch Transformers, arXiv 2101.03961)."""
    probabilities_TE = logits_TE.softmax(-1)
    chosen = probabilities_TE.topk(TOP_K).indices
    shares_E = torch.bincount(chosen.flatten(), minlength=EXPERTS) / chosen.numel()
    return EXPERTS * (shares_E * probabilities_TE.mean(0)).sum()


def z_loss(logits_TE: torch.Tensor) -> torch.Tensor:
    """Mean of squared log-sums (ST-MoE, arXiv 2202.08906)."""
    return logits_TE.logsumexp(-1).square().mean()


def gradient_norm(model: pathlib.Path, loss: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Of coefficient × the loss of each layer's logits over all rows of a rollout."""
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    samples = [sample for group in random_groups(0) for sample in group.samples]
    rows = [torch.from_numpy(sample.tokens[:-1].astype(np.int64))[None] for sample in samples]
    logits = [stock(tokens, output_router_logits=True).router_logits for tokens in rows]
    for layer in zip(*logits, strict=True):
        (COEFFICIENT * loss(torch.cat(layer))).backward(retain_graph=True)
    return float(torch.nn.utils.get_total_norm([p.grad for p in stock.parameters() if p.grad is not None]))


@pytest.mark.parametrize(("name", "loss"), [("balance", balance), ("replayed-balance", balance), ("z", z_loss)])
def test_a_loss_of_routers_is_a_mean_over_rows(
    results: pathlib.Path, name: str, loss: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    norm = metrics_of(results, name)["train/grad_norm"]
    assert norm == pytest.approx(gradient_norm(results / "model", loss), rel=1e-3)


@pytest.mark.slow
def test_two_replicas_balance_as_one_does(more_results: pathlib.Path) -> None:
    norms = [metrics_of(more_results, name)["train/grad_norm"] for name in ("z", "z-dp2")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    moved = [biases(more_results / f"{name}.safetensors") for name in ("moved-recomputed", "moved-dp2")]
    assert all(torch.equal(moved[0][layer], moved[1][layer]) for layer in BIASED_LAYERS)


def test_frozen_gates_stay_as_they_are_while_the_rest_learns(results: pathlib.Path) -> None:
    before, after = (load_file(file) for file in (results / "model/model.safetensors", results / "frozen.safetensors"))
    gates = [name for name in after if name.endswith("mlp.gate.weight")]
    assert len(gates) == 4
    assert all(torch.equal(before[name], after[name]) for name in gates)
    kept = [name for name in after if name in before and torch.equal(before[name], after[name])]
    assert kept == gates


def test_scores_have_the_number_type_that_was_asked_for(results: pathlib.Path) -> None:
    """Beside 16-bit hidden states scores in 32 and 64 bits choose alike, and those in 16 bits do not."""
    close = largest_difference(results, "scores-fp32", "scores-fp64")
    far = largest_difference(results, "scores-fp32", "scores-none")
    assert far > 2 * close


def biases(file: pathlib.Path) -> dict[int, torch.Tensor]:
    tensors = load_file(file)
    return {i: tensors[f"model.layers.{i}.mlp.gate.e_score_correction_bias"].float() for i in BIASED_LAYERS}


def test_a_step_moves_biases_towards_balance_once(results: pathlib.Path) -> None:
    """Though layers were recomputed, and the step was abandoned before it was taken."""
    before = biases(results / "biased/model.safetensors")
    after = biases(results / "moved-recomputed.safetensors")
    samples = [s for group in random_groups(0, routing=(EXPERTS, len(BIASED_LAYERS), TOP_K)) for s in group.samples]
    experts_TNK = np.concatenate([sample.rollout_routed_experts for sample in samples])
    for index, layer in enumerate(BIASED_LAYERS):
        counts_E = np.bincount(experts_TNK[:, index].ravel(), minlength=EXPERTS)
        moved_E = RATE * torch.from_numpy(np.sign(counts_E.mean() - counts_E)).float()
        torch.testing.assert_close(after[layer], before[layer] + moved_E)


def test_biases_stay_as_they_are_otherwise(results: pathlib.Path) -> None:
    before, after = biases(results / "biased/model.safetensors"), biases(results / "kept.safetensors")
    assert all(torch.equal(before[layer], after[layer]) for layer in BIASED_LAYERS)
