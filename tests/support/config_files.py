"""A folder with the files that a configuration names."""

from __future__ import annotations

import pathlib

import pytest


@pytest.fixture
def files(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A folder with models, checkpoints, prompts and a module, which is also the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    for name, file in (("other", "config.json"), ("own/step_00000004", "trainer.json")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / file).write_text("{}")
    (tmp_path / "dist" / "release").mkdir(parents=True)
    (tmp_path / "dist" / "latest_checkpointed_iteration.txt").write_text("release")
    for name in ("metadata.json", ".metadata"):
        (tmp_path / "dist" / "release" / name).write_bytes(b"")
    (tmp_path / "prompts.jsonl").write_text('\n{"input": "2+2", "answer": "4"}\n')
    (tmp_path / "rewards.py").write_text("raise SystemExit\nasync def score(sample): ...\nLIMIT = 3\n")
    return tmp_path
