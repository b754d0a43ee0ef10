"""A whole run with a teacher behind SGLang and no reward, by the words of public recipes."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file
from sglang_kit import ON_GPU, have_sglang
from sglang_teacher import KEY, command, free_port
from whole_runs import Run, recipe

from miles.rpc import ExitCode

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(ON_GPU or not have_sglang(), reason="needs SGLang for the CPU: make test-engines"),
]
FUNCTIONS = "miles.rollout.on_policy_distillation"


def test_a_run_is_trained_on_its_teacher_alone(
    start_run: Callable[[list[str], pathlib.Path], Run], tiny_dense: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    teacher = shutil.copytree(tiny_dense / "model", tmp_path / "teacher")
    generator = torch.Generator().manual_seed(1)
    weights = load_file(teacher / "model.safetensors")
    moved = {name: w + 0.5 * w.std() * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    save_file(moved, teacher / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "key").write_text(KEY)
    port = free_port()
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(command(teacher, port), stdout=log, stderr=subprocess.STDOUT)
    distillation = {
        "rm_type": None,
        "label_key": None,
        "custom_rm_path": f"{FUNCTIONS}.reward_func",
        "rm_url": f"http://127.0.0.1:{port}/generate",
        "use_opd": True,
        "opd_type": "sglang",
        "opd_teacher_key_file": tmp_path / "key",
        "opd_log_prob_top_k": 4,
        "n_samples_per_prompt": 4,
        "num_rollout": 3,
        "lr": 2e-4,
        "no_gateway": True,
    }
    try:
        run = start_run(recipe(tiny_dense, tmp_path / "run", **distillation), tmp_path / "run")
        assert run.wait(900) == ExitCode.OK, run.output()
    finally:
        server.kill()
        server.wait()
    gaps = [step["train/opd_reverse_kl"] for step in run.metrics()]
    assert len(gaps) == 3
    assert gaps[0] > 0.01
    assert all(step["train/grad_norm"] > 0 for step in run.metrics())
    assert all(step["rollout/raw_reward"] == 0 for step in run.metrics())
