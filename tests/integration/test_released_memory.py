"""Weights, gradients and optimizer go to host memory and back between all calls, and nothing is different."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from megatron_kit import needs_megatron, run_cases
from safetensors.torch import load_file
from trainer_cases import job_config, write_dense_model, write_moe_model

from miles.launcher.placement import settings_of
from miles.memory.amount import When
from miles.memory.least import trainer_state
from miles.memory.megatron import layout_of
from miles.memory.run import run_of

EVERY_ROLE = {"advantage_estimator": "ppo", "critic_lr": 0.02, "use_kl_loss": True, "kl_loss_coef": 0.1}
INT4 = {"int4_qat": True, "int4_layers": (".",), "int4_group_size": 16}
OLD = {"keep_old_actor": True, "max_weight_staleness": 1}


def pair(name: str, model: pathlib.Path, flags: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    case = {"model": str(model), "flags": {"max_tokens_per_gpu": 32, **flags}, "steps": 2, **more}
    return [{**case, "name": name}, {**case, "name": f"{name}-swapped", "swap": True, "save_at": 1}]


def assert_equal(out: pathlib.Path, name: str) -> list[int]:
    """Both cases end with the same weights and had the same losses, bit for bit; returns the bytes of each swap."""
    one, other = (load_file(out / f"{each}.safetensors") for each in (name, f"{name}-swapped"))
    assert one.keys() == other.keys()
    assert all(one[key].equal(other[key]) for key in one)
    results = [json.loads((out / f"{each}.json").read_text()) for each in (name, f"{name}-swapped")]
    losses = [[step["train/loss"] for step in result["metrics"]] for result in results]
    assert losses[0] == losses[1]
    moved: list[int] = results[1]["moved"]
    return moved


def assert_estimated(out: pathlib.Path, case: dict[str, Any], within: float = 0.03) -> None:
    """Each rank held what `miles plan` says it holds between steps: padding and small buffers are the rest."""
    flags = {"actor_num_gpus_per_node": 2, "log_samples_per_step": 0, **case["flags"]}
    run = run_of(settings_of(job_config(pathlib.Path(case["model"]), **flags)))
    assert run is not None
    held = [each[-1] for each in json.loads((out / f"{case['name']}.json").read_text())["moved_by_rank"]]
    for rank, nbytes in enumerate(held):
        stage = layout_of(run).stage_of(rank) if run.settings.train_backend == "megatron" else 0
        parts = [part for part in trainer_state(run, stage)[0] if part.when is When.ALWAYS]
        assert sum(part.bytes for part in parts) == pytest.approx(nbytes, rel=within), [str(part) for part in parts]


def parameters(out: pathlib.Path, name: str) -> int:
    return sum(tensor.numel() for tensor in load_file(out / f"{name}.safetensors").values())


def test_two_fsdp_ranks(tmp_path: pathlib.Path) -> None:
    model = write_dense_model(tmp_path / "model")
    cases = [*pair("roles", model, EVERY_ROLE), *pair("old", model, OLD), *pair("adapter", model, {"lora_rank": 2})]
    cases += pair("int4", model, INT4)
    run_cases(cases, tmp_path, ranks=2, megatron=False)
    for name in ("roles", "old", "adapter", "int4"):
        moved = assert_equal(tmp_path, name)
        assert moved[-1] > moved[0]  # Adam's moments have come
    for case in cases[1::2]:
        assert_estimated(tmp_path, case)
    # The policy: float32 weights and two moments, half of each on each rank.
    assert assert_equal(tmp_path, "old")[-1] >= 3 * 4 * parameters(tmp_path, "old") // 2


@pytest.mark.engine
@pytest.mark.timeout(600)
@needs_megatron
def test_two_megatron_ranks(tmp_path: pathlib.Path) -> None:
    dense = write_dense_model(tmp_path / "dense", layers=4)
    experts = write_moe_model(tmp_path / "experts")
    megatron = {"train_backend": "megatron"}
    cases = [
        *pair("pp2", dense, {**EVERY_ROLE, **megatron, "pipeline_model_parallel_size": 2}),
        *pair("dp2", dense, {**OLD, **megatron, "use_distributed_optimizer": True, "overlap_grad_reduce": True}),
        *pair("ep2", experts, {**megatron, "expert_model_parallel_size": 2, "train_dtype": "bfloat16"}),
        pair("tp2", experts, {**megatron, "tensor_model_parallel_size": 2, "sequence_parallel": True})[1],
    ]
    run_cases(cases, tmp_path, ranks=2)
    for name in ("pp2", "dp2", "ep2"):
        moved = assert_equal(tmp_path, name)
        assert moved[-1] > moved[0] > 0
    for case in cases:
        if "swap" in case:
            assert_estimated(tmp_path, case)
