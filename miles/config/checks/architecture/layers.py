"""What config.json says of layers, norms, embeddings and rotary positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from miles.config.checks.architecture.hf_config import Expected, HfConfig

Reader = Callable[[HfConfig], Expected | None]

_NORMED_QK = ("qwen3", "gemma3", "gemma4", "olmo2", "olmo3", "minimax_m2")
"""Beginnings of types whose attention norms queries and keys, though config.json does not say so."""
_QKV_BIAS = ("qwen2", "qwen2_moe", "mimo")
_ONE_PLUS_WEIGHT = ("gemma", "qwen3_next", "qwen3_5")
_NORMED_OUTPUTS = ("glm4", "gemma2", "gemma3", "gemma4")
_INTERLEAVED = ("glm", "glm4", "cohere", "llama4", "ernie4_5", "deepseek")
_WITHOUT_POSITIONS = ("nemotron_h", "inkling")


def reads(*names: str) -> Reader:
    """Return the reader of the first of these keys, or of its default."""

    def read(model: HfConfig) -> Expected | None:
        found = model.find(*names)
        return None if found is None else Expected(found[0], (found[1],))

    return read


def of_family(beginnings: tuple[str, ...]) -> Reader:
    """Return the reader of what is so in families whose types begin like this, and in no others."""

    def read(model: HfConfig) -> Expected | None:
        return Expected("model_type", (model.type.startswith(beginnings),)) if model.type else None

    return read


def _ffn(model: HfConfig) -> Expected | None:
    """A model whose layers all have experts may have no width of dense layers."""
    found = model.find("intermediate_size", "moe_intermediate_size")
    if found is None:
        return None
    experts = model.value("moe_intermediate_size") if model.has_experts else None
    return Expected(found[0], (found[1], *((experts,) if experts is not None else ())))


def _groups(model: HfConfig) -> Expected | None:
    heads, groups = model.find("num_attention_heads"), model.find("num_key_value_heads", "multi_query_group_num")
    if heads is None or groups is None:
        return None
    equal = heads[1] == groups[1]
    return Expected(groups[0], (not equal, *((equal,) if equal else ())))


def _head_width(model: HfConfig) -> Expected | None:
    """Latent attention has widths of its own, beside which this one is of no consequence."""
    heads, width = model.find("num_attention_heads"), model.find("hidden_size")
    if model.is_latent:
        return Expected("kv_lora_rank", ())
    if (given := model.given("head_dim")) is not None:
        return Expected(given[0], (given[1],))
    if heads is None or width is None:
        return None
    return Expected("hidden_size / num_attention_heads", (width[1] // heads[1],))


def _normalization(model: HfConfig) -> Expected | None:
    if model.type == "nemotron_h":
        return Expected("model_type", ("RMSNorm",))
    found = model.find("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")
    return None if found is None else Expected(found[0], ("RMSNorm" if found[0] == "rms_norm_eps" else "LayerNorm",))


def _normed_qk(model: HfConfig) -> Expected | None:
    if model.is_latent:
        return Expected("kv_lora_rank", (True,))
    if (found := model.given("use_qk_norm")) is not None:
        return Expected(found[0], (bool(found[1]),))
    return of_family(_NORMED_QK)(model)


def _gated(model: HfConfig) -> Expected | None:
    found = model.find("hidden_act", "hidden_activation", "mlp_hidden_act")
    return None if found is None else Expected(found[0], (found[1] in ("silu", "swish"),))


def _bias(model: HfConfig) -> Expected | None:
    found = model.given("mlp_bias", "use_bias")
    if model.type == "gpt_oss":
        return Expected("model_type", (True,))
    return Expected("model_type", (False,)) if found is None else Expected(found[0], (bool(found[1]),))


def _qkv_bias(model: HfConfig) -> Expected | None:
    if model.is_latent:
        return Expected("kv_lora_rank", (False, True))  # latent attention takes no notice of it
    if (found := model.given("attention_bias", "qkv_bias")) is not None:
        return Expected(found[0], (bool(found[1]),))
    if model.type in _QKV_BIAS:
        return Expected("model_type", (True,))
    return reads("attention_bias")(model)


def _untied(model: HfConfig) -> Expected | None:
    found = model.find("tie_word_embeddings")
    return None if found is None else Expected(found[0], (not found[1],))


def _positions(model: HfConfig) -> Expected | None:
    if model.type.startswith(_WITHOUT_POSITIONS):
        return Expected("model_type", ("none",))
    rope = model.rope()
    if not rope:
        return None
    kinds = {str(part.get("rope_type") or part.get("type") or "") for part in rope}
    more = ("yarn",) if "yarn" in kinds else ()
    return Expected("rope_theta", ("rope", *more, *(("mrope",) if any("mrope_section" in p for p in rope) else ())))


def _rotary(model: HfConfig) -> Expected | None:
    found = _positions(model)
    return None if found is None else Expected(found.key, ("rope" in found.values,))


def _learned_positions(model: HfConfig) -> Expected | None:
    found = _positions(model)
    return None if found is None else Expected(found.key, (False,))


def rope_value(name: str, absent: float | None = None) -> Reader:
    """Return the reader of a number that is said of rotary positions; `absent` is what its absence means."""

    def read(model: HfConfig) -> Expected | None:
        values = tuple(part[name] for part in model.rope() if part.get(name) is not None)
        if values:
            return Expected(name, values)
        return None if absent is None or not model.rope() else Expected(name, (absent,))

    return read


def _rotary_share(model: HfConfig) -> Expected | None:
    rotated, width = model.value("rotary_dim"), model.value("head_dim")
    if rotated is not None and width:
        return Expected("rotary_dim / head_dim", (rotated / width,))
    return rope_value("partial_rotary_factor", 1.0)(model)


def _interleaved(model: HfConfig) -> Expected | None:
    if (found := model.given("rope_interleave")) is not None:
        return Expected(found[0], (bool(found[1]),))
    return Expected("model_type", (model.type in _INTERLEAVED or model.type.startswith(("llama4", "cohere")),))


def _scaled_like_llama(model: HfConfig) -> Expected | None:
    kinds = {str(part.get("rope_type") or part.get("type") or "default") for part in model.rope()}
    return Expected("rope_type", ("llama3" in kinds,)) if kinds else None


LAYERS: Mapping[str, Reader] = {
    "num_layers": reads("num_hidden_layers"),
    "hidden_size": reads("hidden_size"),
    "ffn_hidden_size": _ffn,
    "num_attention_heads": reads("num_attention_heads"),
    "group_query_attention": _groups,
    "num_query_groups": reads("num_key_value_heads", "multi_query_group_num"),
    "kv_channels": _head_width,
    "normalization": _normalization,
    "norm_epsilon": reads("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"),
    "apply_layernorm_1p": of_family(_ONE_PLUS_WEIGHT),
    "qk_layernorm": _normed_qk,
    "post_self_attn_layernorm": of_family(_NORMED_OUTPUTS),
    "post_mlp_layernorm": of_family(_NORMED_OUTPUTS),
    "swiglu": _gated,
    "activation_func_clamp_value": reads("swiglu_limit"),
    "add_bias_linear": _bias,
    "add_qkv_bias": _qkv_bias,
    "untie_embeddings_and_output_weights": _untied,
    "vocab_size": reads("vocab_size"),
    "max_position_embeddings": reads("max_position_embeddings"),
    "position_embedding_type": _positions,
    "add_position_embedding": _learned_positions,
    "use_rotary_position_embeddings": _rotary,
    "rotary_base": rope_value("rope_theta"),
    "rotary_percent": _rotary_share,
    "rotary_interleaved": _interleaved,
    "use_rope_scaling": _scaled_like_llama,
}
"""Readers by setting of the section Architecture."""


def same(one: object, other: object) -> bool:
    """Whether a setting and a value of config.json are the same: numbers up to how they are written."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return list(one) == list(other)
    return one == other
