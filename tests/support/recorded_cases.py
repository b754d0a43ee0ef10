"""Training steps that are recorded for the draft model, in layouts of either backend, and what they must have left."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from megatron_models import EXPERTS, TOP_K
from recorded_reference import FLAGS, TEMPERATURE, assert_as_the_stock_model, recorded_in, samples_of
from trainer_cases import random_groups

from miles.drafts.recordings import read, steps

SEED = 3
ROUTING = (EXPERTS, 4, TOP_K)
"""Of the model with experts."""
LAYERS = (-1, 0, 1)
"""Of models of four layers."""
TP2 = {"tensor_model_parallel_size": 2}
SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP = {**PP2, "num_virtual_stages_per_pipeline_rank": 2}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SHORT = {"draft_tokens_per_step": 100, "num_steps_per_rollout": 2, "global_batch_size": 8}
"""Some samples of the first optimizer step."""
PADDED = {"qkv_format": "bshd", "use_dynamic_batch_size": False, "max_tokens_per_gpu": None, "micro_batch_size": 4}

LAYOUTS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "recorded-sp": (2, "dense", {**SP, **RECOMPUTE}),
    "recorded-vpp": (2, "tied", {**VPP, **RECOMPUTE}),
    "recorded-cp2": (2, "dense", {**CP2, **SHORT}),
    "recorded-ep2": (2, "moe", EP2),
    "recorded-tp2": (2, "tied", TP2),
    "recorded-pp2": (2, "moe", {**PP2, "decoder_last_pipeline_num_layers": 1}),
    "recorded-dp2": (2, "dense", SHORT),
    "recorded-padded-sp": (2, "dense", {**SP, **PADDED}),
    "recorded-mtp-sp": (2, "predicting", {**SP, "mtp_num_layers": 1, "enable_mtp_training": True}),
    "recorded-adapter-sp": (2, "dense", {**SP, "lora_rank": 2}),
    "recorded-scaled-sp": (2, "local-global", SP),
    "recorded-scaled-tp2": (2, "local-global", TP2),
    "recorded-replay-vpp": (2, "moe", {**VPP, **RECOMPUTE, "use_rollout_routing_replay": True}),
    "recorded-cp2-ep2": (4, "moe", {**CP2, **EP2}),
    "recorded-tp2-pp2": (4, "moe", {**SP, **PP2, **SHORT}),
}
"""Of Megatron-Core. Name: ranks, the model, and the layout."""
OFTEN = ("recorded-sp", "recorded-vpp", "recorded-cp2", "recorded-ep2")
"""Those that every change is tried on."""
ON_FSDP = "recorded-fsdp"


def megatron_cases(out: pathlib.Path, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """What `backend_cases` is to run."""
    return [recorded_case(name, LAYOUTS[name][1], out, **LAYOUTS[name][2]) for name in names]


def fsdp_case(out: pathlib.Path) -> dict[str, Any]:
    """The same for ranks that share a model by FSDP."""
    return recorded_case(ON_FSDP, "dense", out, train_backend="fsdp", **SHORT)


def recorded_case(name: str, model: str, out: pathlib.Path, **flags: Any) -> dict[str, Any]:
    """One step of a model of the folder `out`."""
    root = recorded_in(out / f"{name}-recordings")
    settings = {"train_backend": "megatron", "adam_eps": 1e-3, **FLAGS, **root, **flags}
    case = {"name": name, "model": str(out / model), "flags": settings, "seed": SEED, "steps": 1}
    if flags.get("use_rollout_routing_replay"):
        case |= {"routing": ROUTING, "own_routing": True, "divert_every": 0}
    return case


def plain_case(name: str, model: str, out: pathlib.Path, **flags: Any) -> dict[str, Any]:
    """The same step without a recording."""
    case = recorded_case(name, model, out, **flags)
    return {**case, "flags": {"train_backend": "megatron", "adam_eps": 1e-3, **TEMPERATURE, **flags}}


def assert_recorded(out: pathlib.Path, name: str) -> None:
    """Compare a recording with what the stock model computes."""
    _, model, flags = LAYOUTS.get(name, (2, "dense", SHORT))
    root = out / f"{name}-recordings"
    assert steps(root) == [0]
    assert [path.name for path in root.iterdir()] == ["step-00000000"]
    found = read(root, 0)
    metrics = json.loads((out / f"{name}.json").read_text())["metrics"][0]
    assert metrics["draft/recorded_tokens"] == sum(len(each.tokens_T) for each in found)
    replayed = flags.get("use_rollout_routing_replay")
    samples = samples_of(random_groups(SEED, routing=ROUTING if replayed else None))
    if budget := flags.get("draft_tokens_per_step"):
        assert 0.7 * budget <= metrics["draft/recorded_tokens"] <= budget
        recorded = {tuple(each.tokens_T.tolist()) for each in found}
        samples = [sample for sample in samples[:8] if tuple(sample.tokens.tolist()) in recorded]
    layers = (-1, 1, 2) if model == "local-global" else LAYERS  # it has six
    assert_as_the_stock_model(out / model, found, samples, layers)
