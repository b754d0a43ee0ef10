"""Launch scripts run, with small sizes, on real Megatron-Core and a real SGLang server on the CPU."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import pytest
from megatron_kit import cpu_environment, needs_megatron
from sglang_kit import CPU_FLAGS, CPU_PYTHON, ON_GPU, have_sglang
from whole_runs import Run

from miles.config.command.flags import opposite
from miles.config.schema.catalog import catalog
from miles.migrate.shell_script import read_shell_script
from miles.rpc import ExitCode

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(2700),
    pytest.mark.skipif(ON_GPU or not have_sglang(), reason="needs SGLang for the CPU: make test-engines"),
    needs_megatron,
]
SCRIPTS = pathlib.Path(__file__).parents[1] / "launch_scripts"
Start = Callable[[list[str], pathlib.Path], Run]
SMALL: dict[str, Any] = {
    "num_rollout": 2,
    "rollout_max_response_len": 6,
    "eval_max_response_len": 6,
    "rollout_skip_special_tokens": True,
    "actor_num_gpus_per_node": 2,
    "rollout_num_gpus_per_engine": 1,
    "max_tokens_per_gpu": 4096,
    "tensor_model_parallel_size": 2,
    "rm_type": "exact_match",
    "lr": 5e-4,
}
ON_CPU: dict[str, Any] = {
    "device": "cpu",
    "train_dtype": "float32",
    "rollout_dtype": "float32",
    "rollout_engine_python": CPU_PYTHON,
    "max_running_requests": 64,
    **{f"sglang_{name}": value for name, value in CPU_FLAGS.items()},
}
GPU_ONLY = (
    *("--no-colocate", "--no-apply-chat-template"),
    *("--no-sglang-mem-fraction-static", "--no-sglang-ep-size", "--no-sglang-max-running-requests"),
)
SHAPES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "num_experts": "num_experts",
    "num_experts_per_tok": "moe_router_topk",
}


def words_of(script: str, model: pathlib.Path, root: pathlib.Path) -> list[str]:
    """The command line of a script, whose /root is `root`, for a small model, with the flags of that model's shape."""
    launch = read_shell_script(SCRIPTS / f"{script}.sh", {"WANDB_KEY": "0" * 40})
    shapes = {entry.flag for entry in catalog().values() if entry.section in ("architecture", "experts", "attention")}
    kept = True
    words: list[str] = []
    for word in launch.words:
        kept = word not in shapes if word.startswith("--") else kept
        words += [word.replace("/root/", f"{root}/")] if kept else []
    config = json.loads((model / "config.json").read_text())
    shape = {SHAPES[key]: config[key] for key in SHAPES if key in config}
    return [*words, *flags(shape), *GPU_ONLY]


def flags(settings: dict[str, Any]) -> list[str]:
    """The words of some settings, SGLang's flags among them; None leaves one out."""
    words = []
    for key, value in settings.items():
        flag = catalog()[key].flag if key in catalog() else "--" + key.replace("_", "-")
        if value is True:
            words.append(flag)
        elif value is None:
            words.append(opposite(flag))
        else:
            words.append(f"{flag}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


def run_script(start_run: Start, script: str, folder: pathlib.Path, tmp_path: pathlib.Path, **changes: Any) -> Run:
    root, run_dir = tmp_path / "root", tmp_path / "run"
    for name, rows in (("dapo-math-17k", "train"), ("aime-2024", "eval")):
        (root / name).mkdir(parents=True)
        shutil.copy(folder / f"{rows}.jsonl", root / name / f"{name}.jsonl")
    model = folder / "model"
    paths = {"hf_checkpoint": str(model), "ref_load": str(model), "run_dir": str(run_dir)}
    environment = {"train_env_vars": cpu_environment(), "gateway": True}
    run = start_run(
        [
            sys.executable,
            "train.py",
            *words_of(script, model, root),
            *flags({**SMALL, **ON_CPU, **paths, **environment, **changes}),
        ],
        run_dir,
    )
    assert run.wait(800) == ExitCode.OK, run.output()
    return run


@pytest.mark.slow
def test_a_mixture_of_experts_with_replay(start_run: Start, tiny_moe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Grouped experts, permute fusion, offloading and a precision-aware Adam are noted on a CPU; replay is real."""
    sizes = {"rollout_batch_size": 16, "n_samples_per_prompt": 8, "over_sampling_batch_size": 32}
    run = run_script(
        start_run, "04-qwen3-30b-a3b-r3-tis", tiny_moe, tmp_path,
        expert_model_parallel_size=2, wandb_mode="offline", **sizes,
    )  # fmt: skip
    metrics = run.metrics()
    assert run.summary()["steps"] == 2
    assert {line["train/tokens_routed_differently"] for line in metrics} == {0}
    assert all("train/tis" in line for line in metrics)
    assert any((run.run_dir / "wandb").iterdir())


@pytest.mark.slow
def test_a_dense_model_with_evaluation(start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run = run_script(
        start_run, "01-qwen3-4b", tiny_dense, tmp_path,
        rollout_batch_size=8, n_samples_per_prompt=4, global_batch_size=32, n_samples_per_eval_prompt=1,
    )  # fmt: skip
    assert run.summary()["steps"] == 2
    assert "aime" in run.summary()["eval"]["before"]
    assert all("train/kl_loss" in line for line in run.metrics())


def test_a_model_that_searches(
    start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the recipe's own functions of generation and reward."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SCRIPTS), os.environ.get("PYTHONPATH", "")]))
    data = tmp_path / "prompts.jsonl"
    data.write_text((tiny_dense / "train.jsonl").read_text())
    run = run_script(
        start_run, "18-qwen2.5-3b-tools", tiny_dense, tmp_path,
        rollout_batch_size=8, n_samples_per_prompt=4, global_batch_size=32, prompt_data=str(data), rm_type=None,
    )  # fmt: skip
    assert run.summary()["steps"] == 2
    assert max(line["rollout/response_len/max"] for line in run.metrics()) > SMALL["rollout_max_response_len"]
