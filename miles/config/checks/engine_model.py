"""Checks whether the inference engine builds the model of a Hugging Face folder with the tensors that it has."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from miles.config.checks.json_file import read_json_object
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings
from miles.engine_spec import ENGINE_SPECS, EngineSpec, engine_spec


def engine_faults(s: FlatSettings) -> Iterator[Fault]:
    """Yield a fault for a model whose tensors the engine cannot take; nothing when the model cannot be read."""
    if not s.hf_checkpoint:
        return
    model = read_json_object(pathlib.Path(s.hf_checkpoint) / "config.json")
    problem = misbuilt(engine_spec(s.rollout_backend), model)
    if problem is not None:
        able = [name for name, spec in ENGINE_SPECS.items() if misbuilt(spec, model) is None]
        yield Fault("rollout_backend", s.rollout_backend, problem, f"set it to {' or '.join(able)}")


def misbuilt(engine: EngineSpec, model: Mapping[str, Any]) -> str | None:
    """How the engine's tensors differ from those of a model with this config.json; None when they do not."""
    dense = _dense_layers(model) if model.get("model_type") in engine.experts_everywhere else []
    if not dense:
        return None
    hidden, wide, narrow = (model.get(key) for key in ("hidden_size", "intermediate_size", "moe_intermediate_size"))
    layer = f"model.layers.{dense[0]}.mlp"
    return (
        f"mlp_only_layers or decoder_sparse_step make {len(dense)} layers dense, such as {layer}.gate_proj.weight "
        f"({wide}, {hidden}), but {engine.name} gives every layer of a {model['model_type']} experts, such as "
        f"{layer}.experts.0.gate_proj.weight ({narrow}, {hidden})"
    )


def _dense_layers(model: Mapping[str, Any]) -> list[int]:
    """Numbers of the layers that have no experts in models of the Qwen family."""
    step, listed = int(model.get("decoder_sparse_step") or 1), set(model.get("mlp_only_layers") or ())
    return [i for i in range(int(model.get("num_hidden_layers") or 0)) if i in listed or (i + 1) % step]
