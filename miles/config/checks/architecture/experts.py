"""What config.json says of mixture-of-experts layers."""

from __future__ import annotations

from collections.abc import Mapping

from miles.config.checks.architecture.hf_config import Expected, HfConfig
from miles.config.checks.architecture.layers import Reader, of_family, reads
from miles.config.layer_frequency import MOST_LAYERS

_COUNTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
_SIGMOID = (
    *("deepseek_v3", "deepseek_v32", "glm4_moe", "glm_moe_dsa", "kimi", "minimax_m2"),
    *("nemotron_h", "llama4", "exaone_moe", "inkling"),
)
_SOFTMAX = ("qwen", "mixtral", "gpt_oss", "gemma4", "deepseek_v2", "olmoe", "granitemoe")
_SHARED_GATE = ("qwen2_moe", "qwen3_next", "qwen3_5_moe")


def _width(model: HfConfig) -> Expected | None:
    found = model.given("moe_intermediate_size", "expert_ffn_hidden_size") or model.find("intermediate_size")
    return None if found is None else Expected(found[0], (found[1],))


def _shared_width(model: HfConfig) -> Expected | None:
    names = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size")
    if (found := model.given(*names)) is not None:
        return Expected(found[0], (found[1],))
    count, width = model.find("n_shared_experts", "num_shared_experts"), model.find("moe_intermediate_size")
    if count is None or width is None:
        return None
    return Expected(f"{count[0]} × {width[0]}", (count[1] * width[1],))


def _scores(model: HfConfig) -> Expected | None:
    if (found := model.given("scoring_func", "score_function")) is not None:
        return Expected(found[0], (found[1],))
    kind = "sigmoid" if model.type.startswith(_SIGMOID) else "softmax" if model.type.startswith(_SOFTMAX) else None
    return None if kind is None else Expected("model_type", (kind,))


def _pre_softmax(model: HfConfig) -> Expected | None:
    """Scores by a sigmoid are made before the choice anyway; normed ones of a softmax are as if made after it."""
    scores = _scores(model)
    if scores is not None and scores.values[0] != "softmax":
        return Expected(scores.key, (True, False))
    found = model.find("norm_topk_prob")
    return None if found is None else Expected(found[0], (not found[1],))


def _choice_bias(model: HfConfig) -> Expected | None:
    if (found := model.given("topk_method")) is not None:
        return Expected(found[0], (found[1] == "noaux_tc",))
    if (found := model.given("use_routing_bias", "moe_router_enable_expert_bias")) is not None:
        return Expected(found[0], (bool(found[1]),))
    biased = tuple(kind for kind in _SIGMOID if kind != "llama4")
    return of_family((*biased, "deepseek_v4"))(model)


def _number_or_one(name: str) -> Reader:
    def read(model: HfConfig) -> Expected | None:
        found = model.find(name)
        return Expected(name, (1,)) if found is None else Expected(found[0], (found[1],))

    return read


def _layers(model: HfConfig) -> Expected | None:
    """One number a layer: 1 with experts, 0 without."""
    count = model.value("num_hidden_layers")
    if not isinstance(count, int) or count > MOST_LAYERS or not model.has_experts:
        return None
    if (kinds := model.given("mlp_layer_types")) is not None:
        return Expected(kinds[0], (tuple(int(kind != "dense") for kind in kinds[1]),))
    every = model.value("moe_layer_freq")
    if isinstance(every, list):
        return Expected("moe_layer_freq", (tuple(every),))
    if (first := model.given("first_k_dense_replace")) is not None:
        step = every or 1
        return Expected(first[0], (tuple(int(i >= first[1] and i % step == 0) for i in range(count)),))
    if model.given("decoder_sparse_step", "mlp_only_layers") is not None:
        step, dense = model.value("decoder_sparse_step") or 1, model.value("mlp_only_layers") or ()
        sparse = tuple(int(i not in dense and (i + 1) % step == 0) for i in range(count))
        return Expected("mlp_only_layers", (sparse,))
    if model.given("hybrid_override_pattern", "layers_block_type", "layer_types", "interleave_moe_layer_step"):
        kinds_known = model.type.startswith(("qwen3_5_moe", "gpt_oss", "gemma4", "minimax_m2"))
        if not kinds_known:
            return None
    return Expected("num_hidden_layers", ((1,) * count,))


EXPERTS: Mapping[str, Reader] = {
    "num_experts": reads(*_COUNTS),
    "moe_layer_freq": _layers,
    "moe_ffn_hidden_size": _width,
    "moe_shared_expert_intermediate_size": _shared_width,
    "moe_shared_expert_gate": of_family(_SHARED_GATE),
    "moe_latent_size": reads("moe_latent_size"),
    "moe_router_topk": reads("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k"),
    "moe_router_score_function": _scores,
    "moe_router_pre_softmax": _pre_softmax,
    "moe_router_enable_expert_bias": _choice_bias,
    "moe_router_topk_scaling_factor": _number_or_one("routed_scaling_factor"),
    "moe_router_num_groups": _number_or_one("n_group"),
    "moe_router_group_topk": _number_or_one("topk_group"),
}
"""Readers by setting of the section Experts."""
