"""User errors: one clear message, a distinct exit code, and nothing is left running."""

from __future__ import annotations

import json
import pathlib
import shutil
import socket
from collections.abc import Callable

import pytest
from whole_runs import Run, recipe

from miles.rpc import ExitCode

Start = Callable[[list[str], pathlib.Path], Run]


def refused(start_run: Start, command: list[str], run_dir: pathlib.Path, *words: str) -> None:
    """The run ends with BAD_CONFIG before anything is started, and says all the words."""
    run = start_run(command, run_dir)
    assert run.wait(200) == ExitCode.BAD_CONFIG, run.output()
    said = run.log.read_text()
    for word in words:
        assert word in said, said
    assert not run_dir.exists()


def test_missing_model_folder(start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    command = recipe(tiny_dense, tmp_path / "run", num_rollout=1, hf_checkpoint=tmp_path / "nowhere")
    refused(start_run, command, tmp_path / "run", "hf_checkpoint", "nowhere")


def test_tokenizer_without_chat_template(start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_dense / "model", model)
    (model / "chat_template.jinja").unlink()
    command = recipe(tiny_dense, tmp_path / "run", num_rollout=1, hf_checkpoint=model, apply_chat_template=True)
    refused(start_run, command, tmp_path / "run", "chat template", "chat_template_path")


def test_batch_sizes_that_do_not_divide(start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    command = recipe(tiny_dense, tmp_path / "run", num_rollout=1, global_batch_size=100)
    refused(start_run, command, tmp_path / "run", "rollout_batch_size", "n_samples_per_prompt", "256", "100")


def test_a_port_in_use(start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = recipe(tiny_dense, tmp_path / "run", num_rollout=1, controller_port=port)
        refused(start_run, command, tmp_path / "run", "controller_port", str(port))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["train.jsonl"]),
        pytest.param(
            '{"prompt": "12345>", "label": "12345"}\n{"prompt": broken\n', ["train.jsonl", "2"], marks=pytest.mark.slow
        ),
        ('{"prompt": "12345>", "label": "12345"}\n{"text": "12345>"}\n', ["train.jsonl", "2", "prompt", "text"]),
    ],
)
def test_unusable_prompt_data(
    start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path, content: str, words: list[str]
) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text(content)
    run = start_run(recipe(tiny_dense, tmp_path / "run", num_rollout=1, prompt_data=data), tmp_path / "run")
    assert run.wait(400) in (ExitCode.BAD_CONFIG, ExitCode.JOB_FAILED), run.output()
    for word in words:
        assert word in run.log.read_text(), run.output()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise RuntimeError('my reward broke')", ["my reward broke"]),
        pytest.param("return float('nan')", ["nan"], marks=pytest.mark.slow),
    ],
)
def test_a_reward_that_never_works_ends_the_job(
    start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path, body: str, words: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "broken_reward.py").write_text(f"def score(sample):\n    {body}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    changes = {"rm_type": None, "custom_rm_path": "broken_reward.score", "num_rollout": 1, "rollout_batch_size": 2}
    run = start_run(recipe(tiny_dense, tmp_path / "run", n_samples_per_prompt=2, **changes), tmp_path / "run")
    assert run.wait(600) == ExitCode.JOB_FAILED, run.output()
    said = run.log.read_text()
    assert json.loads((tmp_path / "run" / "summary.json").read_text()).get("steps", 0) == 0
    for word in words:
        assert word in said, said
