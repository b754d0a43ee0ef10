"""Several ranks leave a training step together, and take it afterwards as if nothing had been."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from megatron_kit import needs_megatron, run_cases
from safetensors.torch import load_file
from trainer_cases import write_dense_model

PPO = {"advantage_estimator": "ppo", "critic_lr": 0.02, "num_steps_per_rollout": 2}
OLD = {"keep_old_actor": True, "max_weight_staleness": 1}


def case(name: str, model: pathlib.Path, flags: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "model": str(model), "flags": {"max_tokens_per_gpu": 32, **flags}, "steps": 2, **more}


def assert_equal(out: pathlib.Path, plain: str, left: str) -> None:
    """The two cases end with the same weights, bit for bit, and had the same losses on the way."""
    one, other = (load_file(out / f"{name}.safetensors") for name in (plain, left))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    losses = [
        [step["train/loss"] for step in json.loads((out / f"{name}.json").read_text())["metrics"]]
        for name in (plain, left)
    ]
    assert losses[0] == losses[1]


def test_two_fsdp_ranks_leave_a_step_between_two_micro_batches(tmp_path: pathlib.Path) -> None:
    model = write_dense_model(tmp_path / "model")
    cases = [case("plain", model, PPO), case("left", model, PPO, abandon_at=2)]
    cases += [case("plain-old", model, OLD), case("left-old", model, OLD, abandon_at=2)]
    run_cases(cases, tmp_path, ranks=2, megatron=False)
    assert_equal(tmp_path, "plain", "left")
    assert_equal(tmp_path, "plain-old", "left-old")


@pytest.mark.engine
@pytest.mark.timeout(600)
@needs_megatron
@pytest.mark.parametrize(
    "layout",
    [{"pipeline_model_parallel_size": 2}, {"use_distributed_optimizer": True, "overlap_grad_reduce": True}],
    ids=["pp2", "dp2"],
)
def test_two_megatron_ranks_leave_a_step_between_two_passes(tmp_path: pathlib.Path, layout: dict[str, Any]) -> None:
    model = write_dense_model(tmp_path / "model", layers=4)
    flags = {"train_backend": "megatron", **layout}
    run_cases(
        [case("plain", model, {**PPO, **flags}), case("left", model, {**PPO, **flags}, abandon_at=0)],
        tmp_path,
        ranks=2,
    )
    assert_equal(tmp_path, "plain", "left")
