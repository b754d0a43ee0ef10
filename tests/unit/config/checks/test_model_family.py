"""Models whose family the trainer or the engine does not know are refused before the start, with the way out."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from config_cases import MINIMAL

from miles.config.checks.model_family import family_faults
from miles.config.job import examine

GEMMA3 = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "sliding_window": 512}
LLAMA4 = {
    "model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"], "attention_chunk_size": 8192,
    "attn_temperature_tuning": 4, "floor_scale": 8192,
}  # fmt: skip
SPARSE = {"model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"], "index_topk": 2048}
QWEN2_MOE = {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "sliding_window": 4096}
NO_LLAMA4 = "rollout_backend = sglang, but SGLang 0.5.21 leaves out the experts when it loads a Llama4ForCausalLM"
SHORT = {"rollout_max_context_len": 2048, "rollout_max_response_len": 1024, "use_dynamic_batch_size": True}


def faults(folder: pathlib.Path, model: dict[str, Any], **changes: Any) -> list[str]:
    (folder / "config.json").write_text(json.dumps(model))
    flat = {**MINIMAL, "rollout_backend": "sglang", "hf_checkpoint": str(folder), **changes}
    return [str(fault) for fault in family_faults(examine(flat).settings)]


@pytest.mark.parametrize(
    ("model", "changes", "expected"),
    [
        (
            {"model_type": "kimi_k9"},
            {},
            "has no causal language model of type kimi_k9; give another model",
        ),
        (
            {"model_type": "minimax", "architectures": ["MiniMaxM2ForCausalLM"]},
            {},
            "a MiniMaxM2ForCausalLM a minimax, which is another model in transformers; set model_type to minimax_m2",
        ),
        (
            {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"]},
            {},
            "rollout_backend = sglang, but SGLang 0.5.21 has no implementation of SmolLM3ForCausalLM; set it to torch",
        ),
        (
            QWEN2_MOE,
            {"train_backend": "megatron"},
            "train_backend = megatron, but megatron-bridge 0.6.2 does not convert Qwen2MoeForCausalLM; set it to fsdp",
        ),
        (
            {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]},
            {"train_backend": "fsdp"},
            "train_backend = fsdp, but its attention has no sinks, which the model has; set it to megatron",
        ),
        (
            {"model_type": "qwen3_next", "layer_types": ["full_attention", "linear_attention"]},
            {"train_backend": "fsdp"},
            "layers of type linear_attention would carry one into the next; set it to megatron",
        ),
        (
            GEMMA3,
            {"rollout_backend": "torch"},
            "rollout_backend = torch, but it has no windowed attention (sliding_window = 512 in the model's",
        ),
        (
            LLAMA4,
            {**SHORT, "max_tokens_per_gpu": 4096, "rollout_backend": "torch"},
            "rollout_backend = torch, but it has no chunked attention (attention_chunk_size = 8192",
        ),
        (
            LLAMA4,
            {**SHORT, "max_tokens_per_gpu": 4096, "use_routing_replay": True},
            "use_routing_replay = true, but a router that weighs what goes into the experts cannot be replayed",
        ),
        (
            LLAMA4,
            {**SHORT, "max_tokens_per_gpu": 4096, "rollout_max_context_len": 16384},
            "rollout_max_context_len = 16384, but in longer samples rows of the model see chunks of 8192 alone",
        ),
        (
            LLAMA4,
            {**SHORT, "use_dynamic_batch_size": False, "micro_batch_size": 4},
            "micro_batch_size = 4, but micro-batches may have 8192 tokens, and this model's rows are scaled wrongly",
        ),
        (
            SPARSE,
            {"max_tokens_per_gpu": 4096, "use_dynamic_batch_size": True},
            "rollout_max_context_len is not set, and in longer samples a row sees more than the 2048 that",
        ),
    ],
)
def test_what_cannot_work_is_refused(
    tmp_path: pathlib.Path, model: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    found = faults(tmp_path, model, **changes)
    assert len(found) == 1, found
    assert expected in found[0]


def test_a_wide_micro_batch_of_a_model_with_scaled_rows_is_refused(tmp_path: pathlib.Path) -> None:
    found = faults(tmp_path, LLAMA4, **SHORT, max_tokens_per_gpu=16384)
    assert {fault.split(" ")[0] for fault in found} == {"max_tokens_per_gpu", "log_probs_max_tokens_per_gpu"}


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (LLAMA4, {**SHORT, "max_tokens_per_gpu": 4096}),
        (SPARSE, {**SHORT, "max_tokens_per_gpu": 16384}),
        (QWEN2_MOE, {"rollout_backend": "torch"}),
        (GEMMA3, {}),
        ({"model_type": "minimax_m2", "architectures": ["MiniMaxM2ForCausalLM"]}, {"train_backend": "megatron"}),
        ({"model_type": "llama"}, {}),
        ({"model_type": "gemma3", "text_config": GEMMA3}, {"rollout_backend": "torch"}),  # refused for its form
        ({}, {}),
    ],
)
def test_what_can_work_has_no_fault(tmp_path: pathlib.Path, model: dict[str, Any], changes: dict[str, Any]) -> None:
    assert faults(tmp_path, model, **changes) == []


def test_the_known_models_are_those_of_the_libraries() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from miles.config.checks import known_models

    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) == known_models.TYPES
    architectures = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    assert architectures > known_models.BRIDGED
    assert architectures > known_models.SERVED
