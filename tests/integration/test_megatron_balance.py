"""The load-balancing loss of the megatron backend beside the formula of Switch Transformers."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
import torch
from megatron_kit import needs_megatron, run_cases
from megatron_models import EXPERTS, TOP_K, write_model
from trainer_cases import random_groups

pytestmark = [pytest.mark.engine, needs_megatron]

COEFFICIENT = 0.5


def gradient_norm(model: pathlib.Path) -> float:
    """Of coefficient × experts × the sum of (share of choices × mean probability), over all rows of a rollout."""
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    samples = [sample for group in random_groups(0) for sample in group.samples]
    rows = [torch.from_numpy(sample.tokens[:-1].astype(np.int64))[None] for sample in samples]
    logits = [stock(tokens, output_router_logits=True).router_logits for tokens in rows]
    for layer in zip(*logits, strict=True):
        probabilities_TE = torch.cat(layer).softmax(-1)
        chosen = probabilities_TE.topk(TOP_K).indices
        shares_E = torch.bincount(chosen.flatten(), minlength=EXPERTS) / chosen.numel()
        loss = COEFFICIENT * EXPERTS * (shares_E * probabilities_TE.mean(0)).sum()
        loss.backward(retain_graph=True)
    return float(torch.nn.utils.get_total_norm([p.grad for p in stock.parameters() if p.grad is not None]))


def test_the_load_balancing_loss_is_a_mean_over_rows(tmp_path: pathlib.Path) -> None:
    model = write_model("Qwen3-MoE", tmp_path / "model")
    flags = {
        "train_backend": "megatron",
        "moe_aux_loss_coeff": COEFFICIENT,
        "max_tokens_per_gpu": 1024,  # one micro-batch
    }
    case = {"name": "balance", "model": str(model), "flags": flags, "steps": 1, "reward": 1.0}
    run_cases([case], tmp_path)
    (metrics,) = json.loads((tmp_path / "balance.json").read_text())["metrics"]
    assert metrics["train/grad_norm"] == pytest.approx(gradient_norm(model), rel=1e-3)
