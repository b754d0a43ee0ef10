"""Megatron's layers in few bits: what they multiply is what engines are sent, in every layout.

Real megatron-core over gloo: all layouts are walked in one start.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from megatron_kit import SUPPORT, needs_megatron, run_python
from megatron_models import write_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600), needs_megatron]

SIZES = {"hidden_size": 192, "intermediate_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "glm": ("GLM-4.5", {**SIZES, "head_dim": 128, "n_routed_experts": 4, "initializer_range": 0.05}),
    "latent": (
        "DeepSeek-V3",
        {**SIZES, "q_lora_rank": 96, "kv_lora_rank": 64, "n_routed_experts": 4, "initializer_range": 0.05},
    ),
}
"""A dense layer, and one of routed and shared experts; sizes that are no multiples of 128 where nothing cuts them."""
FP8 = {"fp8_format": "e4m3", "fp8_recipe": "blockwise"}
INT4 = {"int4_qat": True, "int4_layers": ["."], "int4_group_size": 32}
SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EP2 = {"expert_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dp2": ("glm", {}),
    "tp2": ("glm", SP),
    "ep2": ("glm", EP2),
    "tp2-ep2": ("glm", {**SP, **EP2, "expert_tensor_parallel_size": 1}),
    "pp2": ("glm", {"pipeline_model_parallel_size": 2}),
    "latent-ep2": ("latent", EP2),
}
FORMATS = {"fp8": FP8, "int4": INT4}
OFTEN = ("fp8-tp2", "fp8-tp2-ep2", "fp8-pp2", "int4-tp2", "int4-ep2", "fp8-latent-ep2")


def case(name: str, folder: pathlib.Path) -> dict[str, Any]:
    format_name, _, layout = name.partition("-")
    model, flags = LAYOUTS[layout]
    settings = {"train_backend": "megatron", "use_rollout_routing_replay": True, **FORMATS[format_name], **flags}
    return {"name": name, "model": str(folder / model), "flags": settings, "routing": [4, 1, 2]}


def walk(names: Any, out: pathlib.Path) -> pathlib.Path:
    for model, (family, sizes) in MODELS.items():
        write_model(family, out / model, **sizes)
    file = out / "cases.json"
    file.write_text(json.dumps([case(name, out) for name in names]))
    run_python([str(SUPPORT / "megatron_rounding.py"), str(file), str(out)], ranks=2)
    return out


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with what the layouts gave that every change is tried on."""
    return walk(OFTEN, tmp_path_factory.mktemp("rounding"))
