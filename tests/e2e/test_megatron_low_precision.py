"""Whole runs of Megatron-Core in emulated FP8 and INT4 with the torch engine, on the CPU."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable

import pytest
from megatron_kit import cpu_environment, needs_megatron
from whole_runs import Run, recipe

from miles.rpc import ExitCode

pytestmark = [pytest.mark.slow, needs_megatron]
STEPS = 16
Start = Callable[[list[str], pathlib.Path], Run]


@pytest.mark.parametrize(
    "low",
    [
        {"fp8_format": "e4m3", "fp8_recipe": "blockwise"},
        {"int4_qat": True, "int4_group_size": 32, "int4_layers": ["."]},
    ],
    ids=["fp8_block", "int4"],
)
def test_a_mixture_of_experts_learns_in_low_precision(
    start_run: Start, tiny_moe: pathlib.Path, tmp_path: pathlib.Path, low: dict[str, object]
) -> None:
    command = recipe(
        tiny_moe,
        tmp_path / "run",
        train_backend="megatron",
        train_env_vars=json.dumps(cpu_environment()),
        num_rollout=STEPS,
        eval_prompt_data=["sort", tiny_moe / "eval.jsonl"],
        eval_interval=STEPS,
        eval_temperature=0,
        use_rollout_routing_replay=True,
        check_weight_update_equal=True,
        no_gateway=True,
        **low,
    )
    run = start_run(command, tmp_path / "run")
    assert run.wait() == ExitCode.OK, run.output()
    summary, metrics = run.summary(), run.metrics()
    assert summary["eval"]["before"]["sort"] < 0.4
    assert summary["eval"]["after"]["sort"] > 0.7, run.output()
    # Megatron-Core adds in another order than the engine, and a number beside a boundary is then rounded elsewhere.
    assert max(line["train/train_rollout_logprob_abs_diff"] for line in metrics) < 1e-3
    assert {line["train/tokens_routed_differently"] for line in metrics} == {0}
