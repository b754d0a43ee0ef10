"""Checks whether the trainer and the engine know the model's family, by its config.json alone.

docs/families.md has the families that are tested, and what is known of each.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from miles.config.checks import known_models
from miles.config.checks.json_file import read_json_object
from miles.config.checks.published_form import why_not_read
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings

Model = Mapping[str, Any]

_OWN_TYPE = {"MiniMaxM2ForCausalLM": "minimax_m2", "DeepseekV3ForCausalLM": "deepseek_v3"}
"""Types of architectures that models are published with under another type: before transformers had their code, or, as
Kimi K2, with code of their own that says the same."""

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "deepseek_sparse_attention"}
"""Types of layers in which a row sees other rows through attention alone."""

_READ_BY_SGLANG: Mapping[str, Mapping[str, str]] = {
    "gemma2": {"hidden_act": "gelu_pytorch_tanh"},
    "minimax_m2": {"scoring_func": "sigmoid", "use_routing_bias": "true", "use_qk_norm": "true"},
}
"""By type, what published models say in their config.json, and transformers does not by itself."""


def family_faults(s: FlatSettings) -> Iterator[Fault]:
    """Yield a fault for each part that cannot take the model; nothing when its config.json cannot be read or names
    no type."""
    model = read_json_object(pathlib.Path(s.hf_checkpoint or "") / "config.json")
    if not model.get("model_type") or why_not_read(model) is not None:
        return
    if (fault := _unknown(s, model)) is not None:
        yield fault
        return
    trainers = {"fsdp": why_not_fsdp(model), "megatron": why_not_megatron(model)}
    engines = {"torch": why_not_torch(model), "sglang": why_not_sglang(model)}
    for key, reasons in (("train_backend", trainers), ("rollout_backend", engines)):
        chosen = getattr(s, key)
        if (problem := reasons.get(chosen)) is not None:
            able = [name for name, reason in reasons.items() if reason is None]
            yield Fault(key, chosen, problem, f"set it to {able[0]}" if able else "give another model")
    if s.rollout_backend == "torch" and engines["torch"] is None:
        yield from _engine_length_faults(s, model)
    if s.train_backend == "fsdp" and trainers["fsdp"] is None:
        yield from _length_faults(s, model)
        yield from _routing_faults(s, model)


def _unknown(s: FlatSettings, model: Model) -> Fault | None:
    kind, architecture = str(model["model_type"]), _architecture(model)
    own = _OWN_TYPE.get(architecture, kind)
    if own != kind:
        problem = f"its config.json calls a {architecture} a {kind}, which transformers knows as a {own}"
        return Fault("hf_checkpoint", s.hf_checkpoint, problem, f"set model_type to {own} in it")
    if kind not in known_models.TYPES | known_models.OWN_TYPES:
        problem = f"{known_models.TRANSFORMERS} has no causal language model of type {kind}"
        return Fault("hf_checkpoint", s.hf_checkpoint, problem, "give another model")
    return None


def why_not_fsdp(model: Model) -> str | None:
    """Why the fsdp backend cannot train a model with this config.json; None when it can."""
    if model["model_type"] == "gpt_oss":
        return "its attention has no sinks, which the model has"
    if others := sorted(set(model.get("layer_types") or ()) - _ATTENTION):
        return f"it packs samples into one row, and layers of type {others[0]} would carry one into the next"
    return None


def why_not_megatron(model: Model) -> str | None:
    """Why the megatron backend cannot; see `why_not_fsdp`."""
    return _not_in(known_models.BRIDGED, f"{known_models.MEGATRON_BRIDGE} does not convert", model)


def why_not_sglang(model: Model) -> str | None:
    """Why SGLang cannot serve it."""
    if _architecture(model) == "Llama4ForCausalLM":
        return f"{known_models.SGLANG} leaves out the experts when it loads a Llama4ForCausalLM"
    for key, published in _READ_BY_SGLANG.get(str(model["model_type"]), {}).items():
        if key not in model:
            return f"{known_models.SGLANG} reads {key}, which its config.json lacks (published: {published})"
    return _not_in(known_models.SERVED, f"{known_models.SGLANG} has no implementation of", model)


def why_not_torch(model: Model) -> str | None:
    """Why the torch engine cannot."""
    if model["model_type"] == "gpt_oss":
        return "its attention has no sinks, which the model has"
    if others := sorted(set(model.get("layer_types") or ()) - _ATTENTION):
        return f"it has no layers of type {others[0]}"
    return None


def attention_limit(model: Model) -> tuple[str, int] | None:
    """What in a config.json says how many tokens a row sees at most in some layers, and how many; None for all."""
    windows = model.get("use_sliding_window", not str(model["model_type"]).startswith("qwen"))
    keys = ("index_topk", "attention_chunk_size", *(("sliding_window",) if windows else ()))
    found = [(key, int(model[key])) for key in keys if model.get(key)]
    return min(found, key=lambda each: each[1], default=None)


def _not_in(known: frozenset[str], problem: str, model: Model) -> str | None:
    """A fault for an architecture that is named and not known."""
    architecture = _architecture(model)
    known = known | known_models.OWN_ARCHITECTURES
    return f"{problem} {architecture}" if architecture and architecture not in known else None


def _architecture(model: Model) -> str:
    return str(next(iter(model.get("architectures") or ()), ""))


def _engine_length_faults(s: FlatSettings, model: Model) -> Iterator[Fault]:
    """The torch engine's attention sees all tokens, as a model's does up to a length."""
    found = attention_limit(model)
    longest = s.rollout_max_context_len or model.get("max_position_embeddings") or 2**31
    if found is None or longest <= found[1]:
        return
    key, limit = found
    problem = f"its attention sees all tokens, and some layers of the model {limit} at most ({key} in its config.json)"
    remedy = f"set rollout_max_context_len to at most {limit}"
    if why_not_sglang(model) is None:
        remedy += ", or rollout_backend to sglang"
    yield Fault("rollout_backend", "torch", problem, remedy)


def _length_faults(s: FlatSettings, model: Model) -> Iterator[Fault]:
    """Packed attention of the fsdp backend sees whole samples, as some models do up to a length only."""
    for key, what in (
        ("index_topk", "a row sees more than the {} that the model's indexer would choose"),
        ("attention_chunk_size", "rows of the model see chunks of {} alone"),
    ):
        limit = model.get(key)
        if limit and (s.rollout_max_context_len is None or s.rollout_max_context_len > limit):
            problem = f"in longer samples {what.format(limit)} ({key} in its config.json), which fsdp does not compute"
            yield Fault("rollout_max_context_len", s.rollout_max_context_len, problem, f"set it to at most {limit}")
    floor = model.get("floor_scale") if model.get("attn_temperature_tuning") else None
    if floor:
        yield from _row_faults(s, int(floor))


def _row_faults(s: FlatSettings, floor: int) -> Iterator[Fault]:
    """transformers' Llama 4 scales queries by their place in the micro-batch, not in their sample, from this one on."""
    if s.use_dynamic_batch_size:
        rows = {key: getattr(s, key) or 0 for key in ("max_tokens_per_gpu", "log_probs_max_tokens_per_gpu")}
    else:
        rows = {"micro_batch_size": s.micro_batch_size * (s.rollout_max_context_len or 0)}
    for key, count in rows.items():
        if count >= floor:
            problem = f"micro-batches may have {count} tokens, and this model's rows are scaled wrongly from {floor} on"
            yield Fault(key, getattr(s, key), problem, f"lower it: fewer than {floor} tokens (floor_scale)")


def _routing_faults(s: FlatSettings, model: Model) -> Iterator[Fault]:
    if model["model_type"] != "llama4_text":
        return
    for key in ("use_rollout_routing_replay", "observe_rollout_routing", "use_routing_replay"):
        if getattr(s, key):
            problem = "a router that weighs what goes into the experts cannot be replayed or observed"
            yield Fault(key, True, problem, "leave it out")
