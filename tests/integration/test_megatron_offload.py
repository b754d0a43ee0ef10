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
OVERLAPPED = {**OFFLOAD, "overlap_cpu_optimizer_d2h_h2d": True}
FLAGS = {
    "train_backend": "megatron",
    "train_dtype": "bfloat16",
    "use_distributed_optimizer": True,
    "adam_eps": 1e-3,
    "weight_decay": 0.1,
}


def assert_equal(out: pathlib.Path, *names: str) -> None:
    here = load_file(out / "here.safetensors")
    for name in names:
        other = load_file(out / f"{name}.safetensors")
        assert here.keys() == other.keys()
        assert [key for key, tensor in here.items() if not tensor.equal(other[key])] == [], name


def case(name: str, model: pathlib.Path, on_gpus: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "model": str(model), "flags": FLAGS, "on_gpus": on_gpus, "steps": 2, **more}


def test_training_is_the_same_wherever_the_state_is(tmp_path: pathlib.Path) -> None:
    """Swapped out between calls too, and over a checkpoint from one place to the other."""
    model = write_model("Llama", tmp_path / "model")
    resumed = [case("back", model, OVERLAPPED, steps=1, save_at=1), case("back", model, {})]
    run_cases([case("here", model, {}), case("there", model, OFFLOAD, swap=True), *resumed], tmp_path)
    assert_equal(tmp_path, "there", "back")


@pytest.mark.slow
def test_checkpoints_go_every_way(tmp_path: pathlib.Path) -> None:
    model = write_model("Llama", tmp_path / "model")
    cases = [case("here", model, {}), case("overlapped", model, OVERLAPPED)]
    for name, (first, second) in {"away": ({}, OFFLOAD), "again": (OFFLOAD, OVERLAPPED)}.items():
        cases += [case(name, model, first, steps=1, save_at=1), case(name, model, second)]
    reset = {**FLAGS, "reset_optimizer_states": True}
    cases += [case(name, model, place, flags=reset) for name, place in (("reset", {}), ("reset there", OVERLAPPED))]
    run_cases(cases, tmp_path)
    assert_equal(tmp_path, "overlapped", "away", "again")
    here, one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("here", "reset", "reset there"))
    assert all(tensor.equal(two[key]) for key, tensor in one.items())
    assert not all(tensor.equal(one[key]) for key, tensor in here.items())


@pytest.mark.slow
def test_two_replicas_of_experts(tmp_path: pathlib.Path) -> None:
    """Each holds the state of its share; an optimizer has two parts, for experts and for the rest."""
    model = write_model("Qwen3-MoE", tmp_path / "model")
    flags = {**FLAGS, "expert_model_parallel_size": 2}
    here = case("here", model, {}, flags=flags)
    first, second = (case("there", model, OFFLOAD, flags=flags, **more) for more in ({"steps": 1, "save_at": 1}, {}))
    run_cases([here, first, second], tmp_path, ranks=2)
    assert_equal(tmp_path, "there")
