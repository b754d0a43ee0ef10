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
    "attn_temperature_tuning": 4, "floor_scale": 8192, "max_position_embeddings": 131072,
}  # fmt: skip
SPARSE = {"model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"], "index_topk": 2048}
QWEN2_MOE = {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "sliding_window": 4096}
MINIMAX = {
    "model_type": "minimax_m2", "architectures": ["MiniMaxM2ForCausalLM"], "scoring_func": "sigmoid",
    "use_routing_bias": True,
}  # fmt: skip
SHORT = {"rollout_max_context_len": 2048, "rollout_max_response_len": 1024, "use_dynamic_batch_size": True}

LLAMA4_RUN = {**SHORT, "max_tokens_per_gpu": 4096, "rollout_backend": "torch"}


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
            "a MiniMaxM2ForCausalLM a minimax, which transformers knows as a minimax_m2; set model_type to minimax_m2",
        ),
        (
            {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]},
            {},
            "which transformers knows as a deepseek_v3; set model_type to deepseek_v3",
        ),
        (
            {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]},
            {},
            "reads hidden_act, which its config.json lacks (published: gelu_pytorch_tanh); set it to torch",
        ),
        (
            MINIMAX,
            {},
            "SGLang 0.5.21 reads use_qk_norm, which its config.json lacks (published: true); set it to torch",
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
            "but its attention sees all tokens, and some layers of the model 512 at most (sliding_window in its config"
            ".json); set rollout_max_context_len to at most 512, or rollout_backend to sglang",
        ),
        (
            LLAMA4,
            {**LLAMA4_RUN, "rollout_backend": "sglang"},
            "SGLang 0.5.21 leaves out the experts when it loads a Llama4ForCausalLM; set it to torch",
        ),
        (
            {"model_type": "jamba", "layer_types": ["full_attention", "mamba"]},
            {"train_backend": "megatron", "rollout_backend": "torch"},
            "rollout_backend = torch, but it has no layers of type mamba; set it to sglang",
        ),
        (
            LLAMA4,
            {**LLAMA4_RUN, "use_routing_replay": True},
            "use_routing_replay = true, but a router that weighs what goes into the experts cannot be replayed",
        ),
        (
            SPARSE,
            {"train_backend": "megatron", "rollout_max_context_len": 2048, "rollout_max_response_len": 1024},
            "megatron-bridge 0.6.2 does not convert DeepseekV32ForCausalLM; set it to fsdp",
        ),
        (
            LLAMA4,
            {**LLAMA4_RUN, "use_dynamic_batch_size": False, "max_tokens_per_gpu": None, "micro_batch_size": 4},
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
    found = faults(tmp_path, LLAMA4, **{**LLAMA4_RUN, "max_tokens_per_gpu": 16384})
    assert {fault.split(" ")[0] for fault in found} == {"max_tokens_per_gpu", "log_probs_max_tokens_per_gpu"}


def test_samples_longer_than_a_chunk_fit_neither_fsdp_nor_the_torch_engine(tmp_path: pathlib.Path) -> None:
    engine, trainer = faults(tmp_path, LLAMA4, **{**LLAMA4_RUN, "rollout_max_context_len": 16384})
    assert engine.endswith("set rollout_max_context_len to at most 8192")
    assert trainer.startswith("rollout_max_context_len = 16384, but in longer samples rows of the model see chunks of")


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (LLAMA4, LLAMA4_RUN),
        (SPARSE, {**SHORT, "max_tokens_per_gpu": 16384}),
        (QWEN2_MOE, {"rollout_backend": "torch"}),
        (GEMMA3, {}),
        (GEMMA3, {"rollout_backend": "torch", "rollout_max_context_len": 512, "rollout_max_response_len": 256}),
        ({**MINIMAX, "use_qk_norm": True}, {"train_backend": "megatron"}),
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
