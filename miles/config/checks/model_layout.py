"""Checks whether the model of a Hugging Face folder fits its name, routing settings and Megatron-Core's layout."""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from miles.config.checks.json_file import read_json_object
from miles.config.schema.faults import ConfigError, Fault
from miles.config.schema.flat_settings import FlatSettings
from miles.config.server_groups import READ, servers_of_service
from miles.pipeline_split import SplitError, split_of

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_OF_EXPERTS = (
    "use_rollout_routing_replay",
    "observe_rollout_routing",
    "use_routing_replay",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_router_bias_update_rate",
    "moe_router_freeze_gate",
    "moe_shared_expert_overlap",
)
"""Settings that do nothing without experts."""


def layout_faults(s: FlatSettings) -> Iterator[Fault]:
    """Yield a fault for each setting that does not fit the model; nothing when the model cannot be read."""
    if not s.hf_checkpoint or not (model := _model_config(s.hf_checkpoint)):
        return
    yield from _family_faults(s, model)
    yield from _length_faults(s, model)
    yield from _engine_faults(s, model)
    yield from _routing_faults(s, model)
    if s.train_backend == "megatron":
        yield from _tensor_faults(s, model)
        yield from _pipeline_faults(s, model)
        yield from _expert_faults(s, model)
        yield from _mtp_faults(s, model)
        yield from _recomputation_faults(s, model)
        yield from _adapter_faults(s, model)


_SHAPE = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    *_EXPERT_COUNTS,
)


def shape_differences(folder: str, other: str, *, with_head: bool = True, with_mtp: bool = False) -> list[str]:
    """Describe how the tensors of two Hugging Face models differ; nothing when one cannot be read.

    Without the head it does not matter whether it is tied to the embeddings. MTP layers count when `with_mtp` is set.
    """
    models = [_model_config(each) for each in (folder, other)]
    if not all(models):
        return []  # reported by the check of folders
    one, two = models
    keys = [key for key in _SHAPE if with_head or key != "tie_word_embeddings"]
    keys += ["num_nextn_predict_layers"] if with_mtp else []
    return [f"{key} is {two.get(key)} instead of {one.get(key)}" for key in keys if one.get(key) != two.get(key)]


def _model_config(folder: str) -> dict[str, Any]:
    model = read_json_object(pathlib.Path(folder) / "config.json")
    return {**model, **model.get("text_config", {})}


def layer_count(folder: str) -> int | None:
    """Return the decoder's layers of a Hugging Face model, without those for MTP; None when it cannot be read."""
    layers = _model_config(folder).get("num_hidden_layers")
    return layers if isinstance(layers, int) else None


def _length_faults(s: FlatSettings, model: dict[str, Any]) -> Iterator[Fault]:
    positions = _positions(model)
    for key in ("rollout_max_context_len", "rollout_max_response_len", "rollout_max_prompt_len"):
        length = getattr(s, key)
        if positions and length is not None and length > positions:
            problem = f"the model has {positions} positions (max_position_embeddings in its config.json)"
            yield Fault(key, length, problem, "lower it")


def _positions(model: dict[str, Any]) -> int:
    """Return the longest sequence that a model is made for; 0 when its config does not say."""
    positions = model.get("max_position_embeddings")
    scaling = model.get("rope_scaling") or model.get("rope_parameters")
    stretched = 0.0
    if isinstance(scaling, dict) and isinstance(scaling.get("factor"), int | float):
        stretched = scaling["factor"] * (scaling.get("original_max_position_embeddings") or positions or 0)
    return max(positions if isinstance(positions, int) else 0, int(stretched))


def _engine_faults(s: FlatSettings, model: dict[str, Any]) -> Iterator[Fault]:
    heads = model.get("num_attention_heads")
    try:
        servers = servers_of_service({key: getattr(s, key) for key in READ})
    except ConfigError:
        return  # another check reports it
    for size in sorted({server.gpus for server in servers}):
        key = "rollout_num_gpus_per_engine" if s.sglang_config is None else "sglang_config"
        yield from _heads_divide(s, key, size, heads)


def _heads_divide(s: FlatSettings, key: str, size: int, heads: int | None) -> Iterator[Fault]:
    shown = size if key != "sglang_config" else f"{s.sglang_config}, with servers of {size} GPUs"
    if s.sglang_args.get("enable_dp_attention"):  # heads are split over the GPUs of one replica of the attention
        size = max(1, size // int(s.sglang_args.get("dp_size") or 1))
    if s.rollout_backend == "sglang" and heads and heads % size:
        problem = f"SGLang's tensor parallelism does not divide the model's {heads} attention heads by it"
        yield Fault(key, shown, problem, "choose one that does")


def _tensor_faults(s: FlatSettings, model: dict[str, Any]) -> Iterator[Fault]:
    size = s.tensor_model_parallel_size
    heads = model.get("num_attention_heads")
    groups = model.get("num_key_value_heads", heads)
    latent = bool(model.get("kv_lora_rank"))
    counts = {
        "attention heads": heads,
        "columns of the dense layers (intermediate_size)": model.get("intermediate_size"),
    }
    for what, count in counts.items():
        if count and count % size:
            yield Fault(
                "tensor_model_parallel_size", size, f"it does not divide the model's {count} {what}", "lower it"
            )
    if groups and not latent and groups % size and size % groups:
        problem = f"it and the model's {groups} key/value heads do not divide each other"
        yield Fault("tensor_model_parallel_size", size, problem, "choose one that does")
    if latent and size > 1 and (s.transformer_impl == "local" or s.device == "cpu"):
        problem = "multi-head latent attention is split over ranks by TransformerEngine's layers alone"
        yield Fault("tensor_model_parallel_size", size, problem, "set it to 1, or train on GPUs with TransformerEngine")


def _pipeline_faults(s: FlatSettings, model: dict[str, Any]) -> Iterator[Fault]:
    layers = model.get("num_hidden_layers")
    if not isinstance(layers, int):
        return
    try:
        split_of(s).virtual_stages(layers)
    except SplitError as error:
        yield Fault(error.setting, error.value, error.problem, error.remedy)


def _mtp_faults(s: FlatSettings, model: dict[str, Any]) -> Iterator[Fault]:
    layers = model.get("num_nextn_predict_layers") or 0
    if s.mtp_num_layers is not None and s.mtp_num_layers != layers:
        problem = f"the model has {layers} MTP layers"
        yield Fault("mtp_num_layers", s.mtp_num_layers, problem, f"set it to {layers}" if layers else "leave it out")
    layout, count = s.pipeline_model_parallel_layout, model.get("num_hidden_layers")
    if s.mtp_num_layers is None or layout is None or not isinstance(count, int):
        return
    with contextlib.suppress(SplitError):  # reported by itself
        split = split_of(s)
        if count - 1 not in split.layers_of(split.stages - 1, count):
            problem = "its last stage has no layer (t), and MTP layers are made like the last one there"
            yield Fault("pipeline_model_parallel_layout", layout, problem, "write tL at its end")


def _recomputation_faults(s: FlatSettings, model: dict[str, Any]) -> Iterator[Fault]:
    if (
        s.recompute_granularity == "selective"
        and "mla_up_proj" in s.recompute_modules
        and not model.get("kv_lora_rank")
    ):
        problem = "the model has no multi-head latent attention"
        yield Fault("recompute_modules", "mla_up_proj", problem, "leave it out")


def _adapter_faults(s: FlatSettings, model: dict[str, Any]) -> Iterator[Fault]:
    for what, there in (("experts", expert_count(model)), ("multi-head latent attention", model.get("kv_lora_rank"))):
        if s.lora_rank and there:
            problem = f"train_backend = megatron adapts no layers of a model with {what}"
            yield Fault("lora_rank", s.lora_rank, problem, "train all weights, or train with fsdp")


_RELATED = {"kimi": "deepseek", "moonlight": "deepseek", "joyai": "deepseek", "mimo": "qwen"}
"""Families whose models have the type of another one in their config.json."""


def _family(name: object) -> str:
    """The letters that a name or type begins with, without the v of a version: deepseek of deepseekv4."""
    letters = re.match("[a-z]*", str(name).lower())
    return letters[0].removesuffix("v") if letters else ""


def _family_faults(s: FlatSettings, model: dict[str, Any]) -> Iterator[Fault]:
    """Names begin with a family as types do, whatever follows: qwen3-30b-a3b is a qwen3_moe."""
    name, found = _family(s.model_name), _family(model.get("model_type"))
    if s.model_name is not None and found not in (name, _RELATED.get(name)):
        problem = f"hf_checkpoint {s.hf_checkpoint} is a {model.get('model_type')}"
        yield Fault("model_name", s.model_name, problem, "name its family, choose its folder, or leave the name out")


def _routing_faults(s: FlatSettings, model: dict[str, Any]) -> Iterator[Fault]:
    if expert_count(model):
        return
    for key in _OF_EXPERTS:
        if value := getattr(s, key):
            yield Fault(key, value, "the model has no experts", "leave it out")


def expert_count(model: dict[str, Any]) -> int:
    """Routed experts of a layer of the model with this config.json; 0 for a dense one."""
    return next((model[key] for key in _EXPERT_COUNTS if model.get(key)), 0)


def _expert_faults(s: FlatSettings, model: dict[str, Any]) -> Iterator[Fault]:
    experts = expert_count(model)
    size, tensor = s.expert_model_parallel_size, s.expert_tensor_parallel_size
    if not experts:
        if size > 1:
            yield Fault("expert_model_parallel_size", size, "the model has no experts", "leave it out")
        return
    if experts % size:
        problem = f"it does not divide the model's {experts} experts"
        yield Fault("expert_model_parallel_size", size, problem, "choose one that does")
    width = model.get("moe_intermediate_size") or model.get("intermediate_size")
    if width and width % tensor:
        problem = f"it does not divide the {width} columns of an expert"
        yield Fault("expert_tensor_parallel_size", tensor, problem, "choose one that does")
    if s.tensor_model_parallel_size > 1 and not s.sequence_parallel:
        problem = "a model with experts needs it when tensor_model_parallel_size is above 1"
        yield Fault("sequence_parallel", False, problem, "turn it on")
