"""Optimizer state in host memory: the same training as with it on the GPU, and checkpoints that either reads.

Megatron-Core's own HybridDeviceOptimizer, with `cuda_stand_ins` for the two kinds of memory.
"""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
from megatron_kit import needs_megatron, run_cases
from megatron_models import write_model
from safetensors.torch import load_file

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600), needs_megatron]

OFFLOAD = {"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True}
HALF = {**OFFLOAD, "optimizer_offload_fraction": 0.5, "overlap_cpu_optimizer_d2h_h2d": True}
FLAGS = {
    "train_backend": "megatron",
    "train_dtype": "bfloat16",
    "use_distributed_optimizer": True,
    "adam_eps": 1e-3,
    "weight_decay": 0.1,
}


def test_training_is_the_same_wherever_the_state_is(tmp_path: pathlib.Path) -> None:
    """Swapped out between calls too, and over a checkpoint from one place to the other."""
    model = write_model("Llama", tmp_path / "model")

    def case(name: str, on_gpus: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"name": name, "model": str(model), "flags": FLAGS, "on_gpus": on_gpus, "steps": 2, **more}

    resumed = {"away": ({}, OFFLOAD), "back": (HALF, {}), "again": (OFFLOAD, HALF)}
    cases = [case("here", {}), case("there", OFFLOAD, swap=True), case("half", HALF)]
    for name, (first, second) in resumed.items():
        cases += [case(name, first, steps=1, save_at=1), case(name, second)]
    run_cases(cases, tmp_path)
    here = load_file(tmp_path / "here.safetensors")
    for name in ("there", "half", *resumed):
        other = load_file(tmp_path / f"{name}.safetensors")
        assert here.keys() == other.keys()
        assert [key for key, tensor in here.items() if not tensor.equal(other[key])] == [], name


@pytest.mark.slow
def test_two_replicas_of_experts(tmp_path: pathlib.Path) -> None:
    """Each holds the state of its share; an optimizer has two parts, for experts and for the rest."""
    model = write_model("Qwen3-MoE", tmp_path / "model")
    flags = {**FLAGS, "expert_model_parallel_size": 2}
    case = {"model": str(model), "flags": flags, "steps": 2}
    offloaded = {**case, "name": "there", "on_gpus": OFFLOAD}
    run_cases([{**case, "name": "here"}, {**offloaded, "steps": 1, "save_at": 1}, offloaded], tmp_path, ranks=2)
    here, there = (load_file(tmp_path / f"{name}.safetensors") for name in ("here", "there"))
    assert [key for key, tensor in here.items() if not tensor.equal(there[key])] == []
