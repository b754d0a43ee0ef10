"""Tiny random models of the families that Megatron-Core trains, as Hugging Face folders."""

from __future__ import annotations

import pathlib
from typing import Any

import torch
from trainer_cases import VOCAB, write_tokenizer

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
EXPERTS = 8
TOP_K = 2

_LATENT: dict[str, Any] = {
    "n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_nextn_predict_layers": 0, "rope_interleave": True, "routed_scaling_factor": 2.5,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "Qwen2, Qwen2.5": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {"head_dim": 8}),
    "Qwen3-MoE": ("Qwen3Moe", {**_EXPERTS, "head_dim": 8, "num_experts": EXPERTS, "norm_topk_prob": True}),
    "DeepSeek-V3": ("DeepseekV3", {**_EXPERTS, **_LATENT, "num_key_value_heads": 4}),
    "GLM-4.5": (
        "Glm4Moe",
        {
            **_EXPERTS, "head_dim": 8, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1,
            "n_group": 1, "topk_group": 1, "use_qk_norm": True, "attention_bias": True, "partial_rotary_factor": 0.5,
            "num_nextn_predict_layers": 0, "pad_token_id": 0,
        },
    ),
    "MiniMax-M2": ("MiniMaxM2", {"head_dim": 8, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}),
    "Gemma 2": ("Gemma2", {"head_dim": 8, "tie_word_embeddings": True, "query_pre_attn_scalar": 8}),
    "Gemma 3": ("Gemma3", {"head_dim": 8, "tie_word_embeddings": True, "query_pre_attn_scalar": 8}),
    "Llama 4": (
        "Llama4",
        {"intermediate_size_mlp": 48, "head_dim": 8, "num_local_experts": EXPERTS, "num_experts_per_tok": 1},
    ),
}  # fmt: skip
"""Family: the prefix of its classes in transformers, and what it sets besides the common sizes."""


def write_model(family: str, folder: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """A random model of a family with its tokenizer; float32."""
    import transformers

    prefix, changes = FAMILIES[family]
    text = "TextConfig" if prefix in ("Gemma3", "Llama4") else "Config"
    torch.manual_seed(seed)
    config = getattr(transformers, prefix + text)(**{**_COMMON, **changes})
    model = getattr(transformers, prefix + "ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases, so that a swap of two of them shows
                parameter.add_(torch.randn(parameter.shape) * 0.1)
            elif name.endswith("gate.weight"):
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder
