"""Adapters on disk, in PEFT's form."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
from safetensors import safe_open

from miles.weights.adapters import peft_folder
from miles.weights.adapters.lora import adapter_names
from miles.weights.adapters.peft_folder import PeftAdapter

NAMES = adapter_names("model.layers.0.self_attn.q_proj.weight")


def adapter() -> PeftAdapter:
    return PeftAdapter(2, 16, dict(zip(NAMES, (torch.randn(2, 8), torch.randn(4, 2)), strict=True)))


def test_an_adapter_is_written_as_peft_names_it_and_read_back(tmp_path: pathlib.Path) -> None:
    written = adapter()
    peft_folder.write(tmp_path / "adapter", written, "models/base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["r"], config["lora_alpha"]) == ("LORA", "CAUSAL_LM", 2, 16)
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    assert config["base_model_name_or_path"] == "models/base"
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert sorted(file.keys()) == [
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
        ]
    read = peft_folder.read(tmp_path / "adapter")
    assert (read.rank, read.alpha) == (2, 16)
    assert all(torch.equal(read.tensors[name], written.tensors[name]) for name in NAMES)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"use_rslora": True}, "use_rslora = True"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias = all"),
        ({"peft_type": "IA3"}, "peft_type is IA3"),
    ],
)
def test_an_adapter_that_is_more_than_lora_is_refused(
    tmp_path: pathlib.Path, change: dict[str, Any], expected: str
) -> None:
    folder = tmp_path / "adapter"
    peft_folder.write(folder, adapter(), "base")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=expected):
        peft_folder.read(folder)
