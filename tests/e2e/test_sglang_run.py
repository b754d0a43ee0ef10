"""A whole run whose rollouts come from a real SGLang server on the CPU, with routing replay and verified updates."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pytest
from sglang_kit import CPU_FLAGS, CPU_PYTHON, ON_GPU, have_sglang
from whole_runs import Run, recipe

from miles.rpc import ExitCode

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(2700),
    pytest.mark.skipif(ON_GPU or not have_sglang(), reason="needs SGLang for the CPU: make test-engines"),
]
STEPS = 20


def test_a_mixture_of_experts_learns_from_sglang_rollouts_with_routing_replay(
    start_run: Callable[[list[str], pathlib.Path], Run], tiny_moe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    command = recipe(
        tiny_moe,
        tmp_path / "run",
        num_rollout=STEPS,
        eval_prompt_data=["sort", tiny_moe / "eval.jsonl"],
        eval_interval=STEPS,
        eval_temperature=0,
        use_rollout_routing_replay=True,
        check_weight_update_equal=True,
        rollout_backend="sglang",
        rollout_engine_python=CPU_PYTHON,
        max_running_requests=64,
        no_gateway=True,
        **{f"sglang_{name}": value for name, value in CPU_FLAGS.items()},
    )
    run = start_run(command, tmp_path / "run")
    assert run.wait(800) == ExitCode.OK, run.output()
    summary, metrics = run.summary(), run.metrics()
    assert summary["steps"] == STEPS
    assert summary["eval"]["after"]["sort"] > summary["eval"]["before"]["sort"] + 0.2, run.output()
    assert max(line["train/train_rollout_logprob_abs_diff"] for line in metrics) < 1e-4
    assert metrics[0]["train/pg_clipfrac"] == 0
