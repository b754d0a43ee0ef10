"""Tiny random models of the families in docs/families.md, as Hugging Face folders."""

from __future__ import annotations

import pathlib
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from trainer_cases import VOCAB, write_tokenizer

from miles.weights.hf_folder import mimo

SIZES: dict[str, Any] = {
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
    "num_nextn_predict_layers": 0, "rope_interleave": True, "routed_scaling_factor": 2.5, "moe_layer_freq": 1,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    },
}  # fmt: skip
"""With all that the configurations of real ones say and SGLang reads."""

_GLM: dict[str, Any] = {
    "head_dim": 8, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "use_qk_norm": True, "attention_bias": True, "partial_rotary_factor": 0.5,
    "num_nextn_predict_layers": 0, "pad_token_id": 0,
}  # fmt: skip
_GEMMA: dict[str, Any] = {
    "head_dim": 8, "tie_word_embeddings": True, "query_pre_attn_scalar": 16, "sliding_window": 8,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "Qwen2, Qwen2.5": ("Qwen2", {}),
    "MiMo": ("MiMo", {"num_nextn_predict_layers": 1}),
    "Qwen2-MoE": (
        "Qwen2Moe",
        {**_EXPERTS, "num_experts": EXPERTS, "shared_expert_intermediate_size": 24, "norm_topk_prob": False},
    ),
    "Qwen3": ("Qwen3", {"head_dim": 8}),
    "Qwen3-MoE": ("Qwen3Moe", {**_EXPERTS, "head_dim": 8, "num_experts": EXPERTS, "norm_topk_prob": True}),
    "DeepSeek-V3": ("DeepseekV3", {**_EXPERTS, **_LATENT, "num_key_value_heads": 4}),
    "DeepSeek-V3, MTP": (
        "DeepseekV3",
        {**_EXPERTS, **_LATENT, "num_key_value_heads": 4, "num_nextn_predict_layers": 1},
    ),
    "DeepSeek-V3.2": (
        "DeepseekV32",
        {
            **_EXPERTS, **_LATENT, "num_key_value_heads": 4, "num_experts": EXPERTS, "index_n_heads": 2,
            "index_head_dim": 16, "index_topk": 64,
        },
    ),
    "GLM-4.5": ("Glm4Moe", {**_EXPERTS, **_GLM}),
    "GLM-4.5, MTP": ("Glm4Moe", {**_EXPERTS, **_GLM, "num_nextn_predict_layers": 1}),
    "GLM-4.7-Flash": ("Glm4MoeLite", {**_EXPERTS, **_LATENT, "num_key_value_heads": 4, "rms_norm_eps": 1e-6}),
    "MiniMax-M2": (
        "MiniMaxM2",
        {
            "head_dim": 8, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": 24,
            "scoring_func": "sigmoid", "use_routing_bias": True, "use_qk_norm": True,  # which SGLang reads
        },
    ),
    "Gemma 2": (
        "Gemma2",
        {
            **_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
            "hidden_act": "gelu_pytorch_tanh",  # which SGLang reads, and published ones have
        },
    ),
    "Gemma 3": ("Gemma3", {**_GEMMA, "num_hidden_layers": 6}),
    "Gemma 3n": (
        "Gemma3n",
        {
            **_GEMMA, "num_hidden_layers": 5, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8, "laurel_rank": 4, "final_logit_softcapping": 3.0,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0, 0.0],
            "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full")],
        },
    ),
    "Llama 4": (
        "Llama4",
        {"intermediate_size_mlp": 48, "head_dim": 8, "num_local_experts": EXPERTS, "num_experts_per_tok": 1},
    ),
}  # fmt: skip
"""Family: the prefix of its classes in transformers, and what it sets besides the common sizes."""


def config_of(family: str, **sizes: Any) -> Any:
    """transformers' configuration of a family's tiny model, with other sizes where some are given."""
    import transformers

    prefix, changes = FAMILIES[family]
    if prefix == "MiMo":
        mimo.register()
        return transformers.AutoConfig.for_model("mimo", **{**SIZES, **changes, **sizes})
    text = "TextConfig" if prefix in ("Gemma3", "Gemma3n", "Llama4") else "Config"
    return getattr(transformers, prefix + text)(**{**SIZES, **changes, **sizes})


def architecture(family: str) -> str:
    """The class that a family's config.json names."""
    return FAMILIES[family][0] + "ForCausalLM"


def write_model(family: str, folder: pathlib.Path, seed: int = 0, **sizes: Any) -> pathlib.Path:
    """A random model of a family with its tokenizer; float32, with other sizes where some are given."""
    import transformers

    torch.manual_seed(seed)
    config = config_of(family, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases, so that a swap of two of them shows
                parameter.add_(torch.randn(parameter.shape) * 0.1)
            elif name.endswith("gate.weight"):
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # what balances a router's experts is part of the weights
                buffer.copy_(torch.randn(buffer.shape) * 0.1)
    model.save_pretrained(folder)
    for number in range(getattr(config, "num_nextn_predict_layers", 0)):
        _add_prediction_layer(folder, config, number)
    write_tokenizer(folder)
    return folder


def _add_prediction_layer(folder: pathlib.Path, config: Any, number: int) -> None:
    """A layer for multi-token prediction, which transformers' modelling code leaves out, like the model's last."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(number)
    last, own = (f"model.layers.{config.num_hidden_layers + offset}." for offset in (-1, number))
    names = {"enorm": "enorm", "hnorm": "hnorm", "shared_head.norm": "shared_head.norm", "eh_proj": "eh_proj"}
    if config.model_type == "mimo":
        own, other = (
            f"model.mtp_layers.{number}.",
            ("token_layernorm", "hidden_layernorm", "final_layernorm", "input_proj"),
        )
        names = dict(zip(names, other, strict=True))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    for name in [name for name in tensors if name.startswith(last)]:
        tensors[own + name.removeprefix(last)] = random(*tensors[name].shape)
    size = config.hidden_size
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{own}{names[name]}.weight"] = 1 + random(size)
    tensors[f"{own}{names['eh_proj']}.weight"] = random(size, 2 * size)
    if config.model_type == "mimo":
        save_file(tensors, path, metadata={"format": "pt"})
        return
    tensors[f"{own}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    tensors[f"{own}shared_head.head.weight"] = head.clone()
    save_file(tensors, path, metadata={"format": "pt"})
