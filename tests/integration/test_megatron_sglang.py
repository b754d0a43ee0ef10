"""What the megatron backend publishes for SGLang is what SGLang servers take, for mixtures of experts.

DeepSeek-V3 is not among them: on a CPU SGLang builds it with scaled rotary embeddings alone, and the tiny one has none.
"""

from __future__ import annotations

import pathlib

import pytest
import torch
from megatron_kit import needs_megatron, run_cases
from megatron_models import write_model
from safetensors.torch import load_file
from sglang_kit import ON_GPU, have_sglang, largest_difference, options, reference_log_probs, respond, running

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(ON_GPU or not have_sglang(), reason="needs SGLang for the CPU: make test-engines"),
    needs_megatron,
]


@pytest.mark.parametrize(
    "family",
    [
        "Qwen3-MoE",
        pytest.param("GLM-4.5, MTP", marks=pytest.mark.slow),
        pytest.param("MiniMax-M2", marks=pytest.mark.slow),
    ],
)
@pytest.mark.asyncio
async def test_servers_hold_what_was_trained(tmp_path: pathlib.Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_model(family, tmp_path / "model")
    flags = {"train_backend": "megatron", "rollout_backend": "sglang", "mtp_num_layers": 1 if "MTP" in family else None}
    case = {"name": "moe", "model": str(folder), "steps": 1, "save_hf": True, "flags": flags}
    run_cases([case], tmp_path)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "moe" / "hf", dtype=torch.float32)
    prompt = [5, 9, 12, 7]
    async with running(options(folder, tmp_path / "logs")) as engine:
        await engine.load_weights(0, load_file(tmp_path / "moe.safetensors"))
        await engine.weight_bytes()
        response = await respond(engine, prompt)
    assert largest_difference(response, reference_log_probs(trained, prompt, response.tokens)) < 1e-5
