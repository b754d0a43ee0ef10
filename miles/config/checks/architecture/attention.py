"""What config.json says of latent and sparse attention, and of scaled rotary positions."""

from __future__ import annotations

from collections.abc import Mapping

from miles.config.checks.architecture.hf_config import Expected, HfConfig
from miles.config.checks.architecture.layers import Reader, of_family, reads, rope_value

_GATED = ("qwen3_next", "qwen3_5")


def _latent(model: HfConfig) -> Expected | None:
    return Expected("kv_lora_rank", (model.is_latent,))


def _rope_kinds(model: HfConfig) -> set[str]:
    return {str(part.get("rope_type") or part.get("type") or "default") for part in model.rope()}


def _rope_type(model: HfConfig) -> Expected | None:
    kinds = _rope_kinds(model)
    if not kinds:
        return None
    if "yarn" in kinds:
        return Expected("rope_type", ("yarn",))
    return Expected("rope_type", ("rope", "yarn"))  # YaRN by a factor of 1 scales nothing


def _factor(model: HfConfig) -> Expected | None:
    return rope_value("factor", 1.0)(model)


def _of_yarn(name: str) -> Reader:
    """Return the reader of a number of YaRN, which is of no consequence where angles are not scaled."""

    def read(model: HfConfig) -> Expected | None:
        return rope_value(name)(model) if "yarn" in _rope_kinds(model) else Expected("rope_type", ())

    return read


def _softmax(model: HfConfig) -> Expected | None:
    return Expected("model_type", ("learnable" if model.type == "gpt_oss" else "vanilla",)) if model.type else None


def _window(model: HfConfig) -> Expected | None:
    """Megatron counts the tokens before one, Hugging Face often the one too."""
    found = model.find("sliding_window")
    if found is None:
        return None
    size = int(found[1])
    return Expected(found[0], (f"{size},0", f"{size - 1},0"))


def _window_period(model: HfConfig) -> Expected | None:
    kinds = model.value("layer_types") or ()
    full = [i + 1 for i, kind in enumerate(kinds) if kind == "full_attention"]
    even = bool(full) and full == [full[0] * (i + 1) for i in range(len(full))]
    return Expected("layer_types", (full[0],)) if even else None


def _variant(model: HfConfig) -> Expected | None:
    if model.type == "deepseek_v4":
        return Expected("model_type", ("dsv4",))
    if model.value("index_topk") is not None:
        return Expected("index_topk", ("dsa",))
    if model.type.startswith(_GATED):
        return Expected("model_type", ("gated_delta_net",))
    return Expected("model_type", ("none",)) if model.type else None


def _hash_layers(model: HfConfig) -> Expected | None:
    if (found := model.given("num_hash_layers")) is not None:
        return Expected(found[0], (found[1],))
    kinds = model.value("mlp_layer_types")
    return None if kinds is None else Expected("mlp_layer_types", (sum(kind == "hash_moe" for kind in kinds),))


ATTENTION: Mapping[str, Reader] = {
    "multi_latent_attention": _latent,
    "q_lora_rank": reads("q_lora_rank"),
    "kv_lora_rank": reads("kv_lora_rank"),
    "qk_head_dim": reads("qk_nope_head_dim", "head_dim"),
    "qk_pos_emb_head_dim": reads("qk_rope_head_dim"),
    "v_head_dim": reads("v_head_dim", "head_dim"),
    "rope_type": _rope_type,
    "rotary_scaling_factor": _factor,
    "original_max_position_embeddings": _of_yarn("original_max_position_embeddings"),
    "beta_fast": _of_yarn("beta_fast"),
    "beta_slow": _of_yarn("beta_slow"),
    "mscale": _of_yarn("mscale"),
    "mscale_all_dim": _of_yarn("mscale_all_dim"),
    "attention_output_gate": of_family(_GATED),
    "use_gated_attention": of_family(_GATED),
    "softmax_type": _softmax,
    "window_size": _window,
    "window_attn_skip_freq": _window_period,
    "experimental_attention_variant": _variant,
    "dsa_indexer_n_heads": reads("index_n_heads"),
    "dsa_indexer_head_dim": reads("index_head_dim"),
    "dsa_indexer_topk": reads("index_topk"),
    "dsv4_window_size": reads("sliding_window"),
    "dsv4_compress_ratios": reads("compress_ratios"),
    "dsv4_compress_rope_theta": reads("compress_rope_theta"),
    "dsv4_n_hash_layers": _hash_layers,
    "dsv4_hc_mult": reads("hc_mult"),
    "dsv4_hc_sinkhorn_iters": reads("hc_sinkhorn_iters"),
    "dsv4_o_groups": reads("o_groups"),
    "dsv4_o_lora_rank": reads("o_lora_rank"),
}
"""Readers by setting of the section Attention."""
