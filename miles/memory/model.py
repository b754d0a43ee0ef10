"""The shape of a causal language model, from its Hugging Face config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

_TIED = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text"})
"""Model types whose head is tied unless their configuration says otherwise."""
_QUERY_BIAS = frozenset({"qwen2", "qwen2_moe", "mimo"})
"""Model types whose queries, keys and values have biases, whatever their configuration says."""
_OUTPUT_BIAS = frozenset({"llama", "qwen3", "qwen3_moe", "deepseek_v3", "gemma2", "gemma3", "gemma3_text"})
"""Model types whose `attention_bias` gives the output projection a bias too."""
_HEAD_NORMS = frozenset({"qwen3", "qwen3_moe", "gemma3", "gemma3_text"})
"""Model types with norms of each head's queries and keys."""
_FOUR_NORMS = frozenset({"gemma2", "gemma3", "gemma3_text"})
"""Model types with norms before and after both parts of a layer."""
_SCORE_BIAS = frozenset({"deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "minimax_m2"})
"""Model types whose routers add a bias to their scores."""
PLAIN_HEADS = frozenset(
    {
        *("llama", "mistral", "mixtral", "phi3", "smollm3", "olmo2", "olmoe"),
        *("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "glm4", "glm4_moe", "deepseek_v3"),
    }
)
"""Model types of which fsdp never holds more than 2 GiB of logits."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclasses.dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): sizes per head, and of the latent vectors."""

    query_rank: int | None
    """None: queries are made without one."""
    key_value_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    index_heads: int = 0
    """Of the indexer that chooses which tokens are attended to (DeepSeek-V3.2); 0: there is none."""
    index_dim: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder's parts, in elements."""

    hidden: int
    layers: int
    vocabulary: int
    heads: int
    key_value_heads: int
    head_dim: int
    width: int
    """Of the dense layers' MLP."""
    tied: bool
    """Whether the head is the embedding."""
    latent: Latent | None = None
    experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    shared_width: int = 0
    """Of all shared experts of a layer together."""
    shared_gate: bool = False
    """Whether the shared experts have a gate of their own."""
    score_bias: bool = False
    expert_layers: frozenset[int] = frozenset()
    """Numbers of the layers with experts; the others are dense."""
    query_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: Literal["head", "all"] | None = None
    """Norms of queries and keys: one per head with shared weights, or one over all heads."""
    norms: int = 2
    """Of a layer, each of `hidden` elements."""
    mtp_layers: int = 0
    """MTP layers that the folder's configuration names."""
    plain_head: bool = False
    """Whether the head's output is neither scaled nor capped."""


def shape_of(config: Mapping[str, Any]) -> ModelShape | None:
    """Return the shape that a config.json describes; None when it lacks what every decoder's has."""
    model = {**config, **(config.get("text_config") or {})}
    kind = str(model.get("model_type", ""))
    try:
        hidden, layers = int(model["hidden_size"]), int(model["num_hidden_layers"])
        heads, vocabulary = int(model["num_attention_heads"]), int(model["vocab_size"])
        width = int(model.get("intermediate_size_mlp") or model["intermediate_size"])
    except (KeyError, TypeError, ValueError):
        return None
    experts = next((int(model[key]) for key in _EXPERTS if model.get(key)), 0)
    bias = bool(model.get("attention_bias"))
    return ModelShape(
        hidden=hidden,
        layers=layers,
        vocabulary=vocabulary,
        heads=heads,
        key_value_heads=int(model.get("num_key_value_heads") or heads),
        head_dim=int(model.get("head_dim") or hidden // heads),
        width=width,
        tied=bool(model.get("tie_word_embeddings", kind in _TIED)),
        latent=_latent(model),
        **(_experts(model, kind, experts, layers) if experts else {}),
        query_bias=bias or kind in _QUERY_BIAS,
        output_bias=bias and kind in _OUTPUT_BIAS,
        mlp_bias=bool(model.get("mlp_bias")),
        query_key_norm=_query_key_norm(model, kind),
        norms=4 if kind in _FOUR_NORMS else 2,
        mtp_layers=int(model.get("num_nextn_predict_layers") or 0),
        plain_head=kind in PLAIN_HEADS,
    )


def _latent(model: Mapping[str, Any]) -> Latent | None:
    if not model.get("kv_lora_rank"):
        return None
    rank = model.get("q_lora_rank")
    return Latent(
        query_rank=int(rank) if rank else None,
        key_value_rank=int(model["kv_lora_rank"]),
        rope_dim=int(model["qk_rope_head_dim"]),
        nope_dim=int(model["qk_nope_head_dim"]),
        value_dim=int(model["v_head_dim"]),
        index_heads=int(model.get("index_n_heads") or 0),
        index_dim=int(model.get("index_head_dim") or 0),
    )


def _experts(model: Mapping[str, Any], kind: str, experts: int, layers: int) -> dict[str, Any]:
    width = int(model.get("moe_intermediate_size") or model["intermediate_size"])
    shared = int(model.get("shared_expert_intermediate_size") or 0)
    if model.get("n_shared_experts"):
        shared = int(model["n_shared_experts"]) * width
    if kind == "llama4_text":
        shared = width
    return {
        "experts": experts,
        "experts_per_token": int(model.get("num_experts_per_tok") or 1),
        "expert_width": width,
        "shared_width": shared,
        "shared_gate": kind == "qwen2_moe",
        "score_bias": kind in _SCORE_BIAS,
        "expert_layers": frozenset(layer for layer in range(layers) if _has_experts(model, layer)),
    }


def _has_experts(model: Mapping[str, Any], layer: int) -> bool:
    if model.get("moe_layers") is not None:
        return layer in model["moe_layers"]
    if layer < int(model.get("first_k_dense_replace") or 0) or layer in (model.get("mlp_only_layers") or ()):
        return False
    step = int(model.get("decoder_sparse_step") or model.get("interleave_moe_layer_step") or 1)
    return (layer + 1) % step == 0


def _query_key_norm(model: Mapping[str, Any], kind: str) -> Literal["head", "all"] | None:
    if kind == "minimax_m2":
        return "all" if model.get("use_qk_norm", True) else None
    return "head" if kind in _HEAD_NORMS or (kind == "glm4_moe" and model.get("use_qk_norm")) else None
