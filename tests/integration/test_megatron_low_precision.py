"""Megatron's layers in few bits: what they multiply is what engines are sent, in every layout.

Real megatron-core over gloo: all layouts are walked in one start.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import pytest
<<<<<<< HEAD
from megatron_kit import SUPPORT, needs_megatron, run_python
=======
import torch
from megatron_kit import SUPPORT, needs_megatron, run_cases, run_python
>>>>>>> p8-C
from megatron_models import write_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600), needs_megatron]

SIZES = {"hidden_size": 192, "intermediate_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "glm": ("GLM-4.5", {**SIZES, "head_dim": 128, "n_routed_experts": 4, "initializer_range": 0.05}),
    "latent": (
        "DeepSeek-V3",
        {**SIZES, "q_lora_rank": 96, "kv_lora_rank": 64, "n_routed_experts": 4, "initializer_range": 0.05},
    ),
<<<<<<< HEAD
=======
    "narrow": (
        "GLM-4.5",
        {**SIZES, "head_dim": 64, "intermediate_size": 192, "moe_intermediate_size": 192, "n_routed_experts": 4},
    ),
>>>>>>> p8-C
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
<<<<<<< HEAD
=======
    "etp2": ("glm", {**SP, "expert_tensor_parallel_size": 2}),
>>>>>>> p8-C
    "tp2-ep2": ("glm", {**SP, **EP2, "expert_tensor_parallel_size": 1}),
    "pp2": ("glm", {"pipeline_model_parallel_size": 2}),
    "latent-ep2": ("latent", EP2),
}
<<<<<<< HEAD
FORMATS = {"fp8": FP8, "int4": INT4}
OFTEN = ("fp8-tp2", "fp8-tp2-ep2", "fp8-pp2", "int4-tp2", "int4-ep2", "fp8-latent-ep2")


def case(name: str, folder: pathlib.Path) -> dict[str, Any]:
    format_name, _, layout = name.partition("-")
    model, flags = LAYOUTS[layout]
    settings = {"train_backend": "megatron", "use_rollout_routing_replay": True, **FORMATS[format_name], **flags}
    return {"name": name, "model": str(folder / model), "flags": settings, "routing": [4, 1, 2]}


def walk(names: Any, out: pathlib.Path) -> pathlib.Path:
=======
FORMATS: dict[str, dict[str, Any]] = {
    "fp8": FP8,
    "powers": {**FP8, "fp8_block_scales": "power_of_two"},
    "int4": INT4,
    "experts": {"int4_qat": True, "int4_group_size": 32},
    "mxfp8": {"fp8_format": "e4m3", "fp8_recipe": "mxfp8"},
    "first": {**FP8, "first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 0},
}
CASES = [f"{kind}-{layout}" for kind in FORMATS for layout in LAYOUTS]
OFTEN = ("fp8-tp2-ep2", "int4-pp2", "first-latent-ep2")
CUT = {"fp8-cut": ("narrow", SP), "int4-cut": ("narrow", {**SP, "int4_group_size": 64})}
"""Layouts that cut between numbers that share a scale."""


def case(name: str, folder: pathlib.Path) -> dict[str, Any]:
    """What `megatron_rounding` is to run."""
    kind, _, layout = name.partition("-")
    model, flags = CUT[name] if name in CUT else LAYOUTS[layout]
    settings = {"train_backend": "megatron", "use_rollout_routing_replay": True, **FORMATS[kind], **flags}
    return {"name": name, "model": str(folder / model), "flags": settings, "routing": [4, 1, 2]}


def walk(names: Sequence[str], out: pathlib.Path) -> pathlib.Path:
    """Run these cases on two ranks; returns the folder with what they gave."""
>>>>>>> p8-C
    for model, (family, sizes) in MODELS.items():
        write_model(family, out / model, **sizes)
    file = out / "cases.json"
    file.write_text(json.dumps([case(name, out) for name in names]))
    run_python([str(SUPPORT / "megatron_rounding.py"), str(file), str(out)], ranks=2)
    return out


@pytest.fixture(scope="module")
<<<<<<< HEAD
def results(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with what the layouts gave that every change is tried on."""
    return walk(OFTEN, tmp_path_factory.mktemp("rounding"))
=======
def often(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return walk([*OFTEN, *CUT], tmp_path_factory.mktemp("often"))


@pytest.fixture(scope="module")
def seldom(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return walk([name for name in CASES if name not in OFTEN], tmp_path_factory.mktemp("seldom"))


def read(name: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a case gave."""
    folder = request.getfixturevalue("often" if name in (*OFTEN, *CUT) else "seldom")
    said: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return said


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in CASES]
)
def test_layers_multiply_what_engines_are_sent(name: str, request: pytest.FixtureRequest) -> None:
    """To the bit, and gradients are those of a model that holds rounded weights."""
    said = read(name, request)
    assert said["other"] == []
    assert said["rounded"] == said["covered"] != []
    assert said["gradients"] == 0.0 < said["gradient"]
    assert said["metrics"][0] == said["metrics"][1]


def test_layouts_that_cut_what_shares_a_scale_are_refused(request: pytest.FixtureRequest) -> None:
    fp8, four_bits = (read(name, request)["refused"] for name in CUT)
    assert "linear_qkv.weight: ranks hold 64 of its rows, which fp8_block scales 128 at a time" in fp8
    assert "linear_fc2.weight: ranks hold 96 of its columns, which int4 scales 64 at a time" in four_bits
    assert "extra_high_precision_layers_hf" in fp8


@pytest.mark.slow
def test_emulation_is_that_of_the_fsdp_trainer(tmp_path: pathlib.Path) -> None:
    """INT4 as closely as without a format. In FP8 sums of another order round some inputs to a neighbour."""
    for model, (family, sizes) in MODELS.items():
        write_model(family, tmp_path / model, **sizes)
    kinds: dict[str, dict[str, Any]] = {"plain": {}, "int4": INT4, "fp8": FP8}
    for backend in ("fsdp", "megatron"):
        run_cases(
            [
                trained_case(f"{backend}-{model}-{kind}", tmp_path, model, train_backend=backend, **flags)
                for model in ("glm", "latent")
                for kind, flags in kinds.items()
            ],
            tmp_path,
            megatron=backend == "megatron",
        )
    for model in ("glm", "latent"):
        for kind, largest, mean in (("plain", 1e-5, 1e-6), ("int4", 1e-5, 1e-6), ("fp8", 0.05, 2e-3)):
            off = difference(tmp_path, f"fsdp-{model}-{kind}", f"megatron-{model}-{kind}")
            assert off.max() < largest, (model, kind)
            assert off.mean() < mean, (model, kind)
        for kind in ("int4", "fp8"):
            assert difference(tmp_path, f"fsdp-{model}-plain", f"fsdp-{model}-{kind}").mean() > 5e-3


def trained_case(name: str, folder: pathlib.Path, model: str, **flags: Any) -> dict[str, Any]:
    """A step of `backend_cases` that leaves its log-probabilities behind."""
    file = str(folder / f"{name}-{{rollout_id}}-{{rank}}.pt")
    settings = {"use_rollout_routing_replay": True, "save_debug_train_data": file, **flags}
    settings |= {"share_prompts": False} if flags["train_backend"] == "fsdp" else {}
    return {"name": name, "model": str(folder / model), "flags": settings, "routing": [4, 1, 2], "steps": 1}


def difference(folder: pathlib.Path, *names: str) -> torch.Tensor:
    """Magnitudes of the differences of two cases' log-probabilities."""
    files = (torch.load(folder / f"{name}-0-0.pt")["samples"] for name in names)
    one, two = (torch.cat([sample["log_probs"] for sample in samples]) for samples in files)
    return (one - two).abs()
>>>>>>> p8-C
