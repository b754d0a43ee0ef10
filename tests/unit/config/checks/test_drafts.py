"""Whether a folder has a draft for the policy, and the draft trainer its device."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from config_cases import MINIMAL

from miles.config.checks.drafts import draft_device_faults, draft_model_faults
from miles.config.job import examine

POLICY = {"model_type": "llama", "hidden_size": 64, "vocab_size": 100, "num_hidden_layers": 8}
HEAD = {"architectures": ["LlamaForCausalLMEagle3"], "hidden_size": 64, "vocab_size": 100, "num_hidden_layers": 1}


def write(folder: pathlib.Path, config: dict[str, Any], *vocabulary: str) -> pathlib.Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()
    if vocabulary:
        tokens = {token: number for number, token in enumerate(vocabulary)}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}}))
    return folder


def found(tmp_path: pathlib.Path, algorithm: str = "EAGLE3", **changes: Any) -> list[str]:
    if not (tmp_path / "policy").exists():
        write(tmp_path / "policy", POLICY, "a", "b")
    given = {"hf_checkpoint": str(tmp_path / "policy"), "sglang_speculative_algorithm": algorithm, **changes}
    return [str(fault) for fault in draft_model_faults(examine(MINIMAL | given).settings)]


def of_folder(tmp_path: pathlib.Path, folder: pathlib.Path, algorithm: str = "EAGLE3") -> list[str]:
    return found(tmp_path, algorithm, sglang_speculative_draft_model_path=str(folder))


def test_a_head_for_the_policy_is_fine(tmp_path: pathlib.Path) -> None:
    layers = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 6]}}
    assert of_folder(tmp_path, write(tmp_path / "head", {**HEAD, **layers})) == []
    assert found(tmp_path, "NGRAM") == []


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"hidden_size": 32}, "its hidden_size is 32, and the policy's hidden_size 64; give a head that was trained"),
        ({"target_hidden_size": 128}, "its target_hidden_size is 128, and the policy's hidden_size 64; give a head"),
        ({"vocab_size": 90}, "its vocab_size is 90, and the policy's vocab_size 100; give a head that was trained for"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 7]}}, "but the policy has 8 layers"),
    ],
)
def test_a_head_of_another_model_is_refused(tmp_path: pathlib.Path, config: dict[str, Any], expected: str) -> None:
    (fault,) = of_folder(tmp_path, write(tmp_path / "head", HEAD | config))
    assert fault.startswith("sglang_speculative_draft_model_path = ")
    assert expected in fault


def test_a_folder_without_a_draft_is_named(tmp_path: pathlib.Path) -> None:
    assert "there is no such folder; give a folder" in of_folder(tmp_path, tmp_path / "gone")[0]
    (tmp_path / "empty").mkdir()
    assert "config.json is missing in it" in of_folder(tmp_path, tmp_path / "empty")[0]
    (write(tmp_path / "head", HEAD) / "model.safetensors").unlink()
    assert "there are no weights in it" in of_folder(tmp_path, tmp_path / "head")[0]


def test_a_standalone_draft_has_the_tokens_of_the_policy(tmp_path: pathlib.Path) -> None:
    small = {**POLICY, "hidden_size": 16}
    assert of_folder(tmp_path, write(tmp_path / "same", small, "a", "b"), "STANDALONE") == []
    (fault,) = of_folder(tmp_path, write(tmp_path / "other", small, "b", "a"), "STANDALONE")
    assert "its tokenizer.json gives 2 of the policy's 2 tokens no id or another one" in fault


def test_a_head_from_nothing_needs_layers_to_read(tmp_path: pathlib.Path) -> None:
    assert found(tmp_path, enable_draft_training=True) == []
    (tmp_path / "policy" / "config.json").write_text(json.dumps({**POLICY, "num_hidden_layers": 2}))
    (fault,) = found(tmp_path, enable_draft_training=True)
    assert "the policy's 2 layers are too few for a head" in fault


def test_a_draft_is_trained_on_a_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    given = {"sglang_speculative_algorithm": "EAGLE3", "enable_draft_training": True, "device": "cuda"}
    settings = examine(MINIMAL | given | {"draft_train_device": "cuda:3"}).settings
    (fault,) = map(str, draft_device_faults(settings))
    assert "draft_train_device = cuda:3, but this machine has 0 GPUs to use" in fault
    assert list(draft_device_faults(examine(MINIMAL | given).settings)) == []
