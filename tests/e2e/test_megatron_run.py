"""Whole runs that train in Megatron-Core over two ranks, on the CPU, with rollouts of the torch engine."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable

import pytest
from megatron_kit import cpu_environment, needs_megatron
from whole_runs import Run, recipe

from miles.rpc import ExitCode

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800), needs_megatron]

Start = Callable[[list[str], pathlib.Path], Run]


def run_to_end(start_run: Start, folder: pathlib.Path, run_dir: pathlib.Path, **changes: object) -> Run:
    megatron = {
        "train_backend": "megatron",
        "actor_num_gpus_per_node": 2,
        "train_env_vars": json.dumps(cpu_environment()),
        **changes,
    }
    run = start_run(recipe(folder, run_dir, **megatron), run_dir)
    assert run.wait(550) == ExitCode.OK, run.output()
    return run


def test_a_mixture_of_experts_learns_over_expert_parallel_ranks(
    start_run: Start, tiny_moe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run = run_to_end(
        start_run,
        tiny_moe,
        tmp_path / "run",
        num_rollout=24,
        expert_model_parallel_size=2,
        use_rollout_routing_replay=True,
        eval_prompt_data=["sort", tiny_moe / "eval.jsonl"],
        eval_interval=10,
        eval_temperature=0,
    )
    summary = run.summary()
    assert summary["eval"]["before"]["sort"] < 0.4
    assert summary["eval"]["after"]["sort"] > 0.8, run.output()
    # The trainer computes with the experts that the engine chose, so that it finds the engine's probabilities.
    assert all(step["train/train_rollout_logprob_abs_diff"] < 1e-4 for step in run.metrics())


def test_rounding_in_the_engine_would_send_tokens_elsewhere(
    start_run: Start, tiny_moe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Engines that compute in bfloat16 choose other experts than a trainer in float32 would; replay prescribes them."""
    run = run_to_end(
        start_run,
        tiny_moe,
        tmp_path / "run",
        num_rollout=1,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        rollout_dtype="bfloat16",
        use_rollout_routing_replay=True,
    )
    first = run.metrics()[0]
    assert 0 < first["train/routing_difference"] < 0.2
    assert first["train/tokens_routed_differently"] == 0
