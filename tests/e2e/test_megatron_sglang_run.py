"""The quick start on its whole stack, on the CPU: Megatron-Core over two ranks, a real SGLang server, experts, R3."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from megatron_kit import cpu_environment, needs_megatron
from sglang_kit import CPU_FLAGS, CPU_PYTHON, ON_GPU, have_sglang
from whole_runs import Run, recipe

from miles.rpc import ExitCode

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(2700),
    pytest.mark.skipif(ON_GPU or not have_sglang(), reason="needs SGLang for the CPU: make test-engines"),
    needs_megatron,
]
STEPS = 12
Start = Callable[[list[str], pathlib.Path], Run]

QUICK_START = {
    "advantage_estimator": "grpo",
    "model_name": "qwen3-30b-a3b",
    "rollout_batch_size": 32,
    "n_samples_per_prompt": 8,
    "actor_num_gpus_per_node": 2,
    "rollout_num_gpus": 1,
    "tensor_model_parallel_size": 2,
    "expert_model_parallel_size": 2,
    "sequence_parallel": True,
}
"""The flags of recipes for large mixtures of experts, with small sizes."""


def run_to_end(start_run: Start, folder: pathlib.Path, run_dir: pathlib.Path, **changes: Any) -> Run:
    on_cpu = {
        "train_backend": "megatron",
        "train_env_vars": json.dumps(cpu_environment()),
        "rollout_backend": "sglang",
        "rollout_engine_python": CPU_PYTHON,
        "max_running_requests": 64,
        "no_gateway": True,
        **{f"sglang_{name}": value for name, value in CPU_FLAGS.items()},
    }
    run = start_run(recipe(folder, run_dir, **{**QUICK_START, **on_cpu, **changes}), run_dir)
    assert run.wait(800) == ExitCode.OK, run.output()
    return run


def test_a_mixture_of_experts_learns_with_routing_replay(
    start_run: Start, tiny_moe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run = run_to_end(
        start_run,
        tiny_moe,
        tmp_path / "run",
        num_rollout=STEPS,
        eval_prompt_data=["sort", tiny_moe / "eval.jsonl"],
        eval_interval=STEPS,
        eval_temperature=0,
        use_rollout_routing_replay=True,
        check_weight_update_equal=True,
    )
    summary, metrics = run.summary(), run.metrics()
    assert summary["steps"] == STEPS
    assert summary["eval"]["before"]["sort"] < 0.4
    assert summary["eval"]["after"]["sort"] > summary["eval"]["before"]["sort"] + 0.3, run.output()
    assert metrics[0]["train/pg_clipfrac"] == 0
    # The trainer computes with the experts that the engine chose, so that it finds the engine's probabilities.
    assert max(line["train/train_rollout_logprob_abs_diff"] for line in metrics) < 1e-4
    assert {line["train/tokens_routed_differently"] for line in metrics} == {0}


@pytest.mark.slow
def test_without_replay_rounding_in_the_engine_sends_tokens_elsewhere(
    start_run: Start, tiny_moe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Engines that compute in bfloat16 choose other experts than a trainer in float32 does."""
    run = run_to_end(
        start_run,
        tiny_moe,
        tmp_path / "run",
        num_rollout=1,
        rollout_batch_size=8,
        rollout_dtype="bfloat16",
        observe_rollout_routing=True,
    )
    assert 0 < run.metrics()[0]["train/tokens_routed_differently"] < 0.5


@pytest.mark.slow
def test_routing_is_replayed_where_one_stage_has_all_layers(
    start_run: Start, tiny_moe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    one_sided = {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Ett|L"}
    one_way = {"tensor_model_parallel_size": 1, "expert_model_parallel_size": 1, "sequence_parallel": None}
    run = run_to_end(
        start_run,
        tiny_moe,
        tmp_path / "run",
        **one_sided,
        **one_way,
        num_rollout=2,
        rollout_batch_size=8,
        use_rollout_routing_replay=True,
        check_weight_update_equal=True,
    )
    metrics = run.metrics()
    assert max(line["train/train_rollout_logprob_abs_diff"] for line in metrics) < 1e-4
    assert {line["train/tokens_routed_differently"] for line in metrics} == {0}


@pytest.mark.slow
def test_engines_get_adapters_of_megatron(start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run = run_to_end(
        start_run,
        tiny_dense,
        tmp_path / "run",
        model_name=None,
        expert_model_parallel_size=1,
        num_rollout=3,
        rollout_batch_size=8,
        lora_rank=8,
        check_weight_update_equal=True,
    )
    metrics = run.metrics()
    assert all(line["train/grad_norm"] > 0 for line in metrics)
    assert max(line["train/train_rollout_logprob_abs_diff"] for line in metrics) < 1e-4
