"""Folders in a form that cannot be trained are refused before the start, with the command that converts them."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from config_cases import MINIMAL

from miles.config.checks.published_form import form_faults
from miles.config.job import examine

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def faults(folder: pathlib.Path, model: dict[str, Any], **changes: Any) -> list[str]:
    (folder / "config.json").write_text(json.dumps(model))
    flat = {**MINIMAL, "hf_checkpoint": str(folder), **changes}
    return [str(fault) for fault in form_faults(examine(flat).settings)]


@pytest.mark.parametrize("backend", ["fsdp", "megatron"])
@pytest.mark.parametrize("engine", ["torch", "sglang"])
def test_fp8_weights_are_to_be_converted(tmp_path: pathlib.Path, backend: str, engine: str) -> None:
    model = {"model_type": "deepseek_v3", "quantization_config": FP8}
    (found,) = faults(tmp_path, model, train_backend=backend, rollout_backend=engine)
    assert "but its weights are quantised (fp8)" in found
    assert f"`miles convert hf-to-hf --hf-checkpoint {tmp_path} --save {tmp_path.name}-plain`" in found


def test_other_quantised_weights_cannot_be_converted(tmp_path: pathlib.Path) -> None:
    for quantised in ({"quant_method": "gptq"}, {**FP8, "weight_block_size": None}):
        (found,) = faults(tmp_path, {"model_type": "llama", "quantization_config": quantised})
        assert found.endswith("give a folder with weights in 16 or 32 bits")


def test_a_text_model_inside_of_another_is_to_be_taken_out(tmp_path: pathlib.Path) -> None:
    model = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}, "vision_config": {}}
    (found,) = faults(tmp_path, model)
    assert "it is a gemma3, of which the text model (gemma3_text) is a part" in found
    assert "miles convert hf-to-hf" in found


def test_every_folder_is_looked_at_once(tmp_path: pathlib.Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "teacher").mkdir()
    (tmp_path / "policy" / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    folders = {"hf_checkpoint": str(tmp_path / "policy"), "ref_load": str(tmp_path / "policy")}
    quantised = {"model_type": "deepseek_v3", "quantization_config": FP8}
    found = faults(tmp_path / "teacher", quantised, **folders, opd_teacher_load=str(tmp_path / "teacher"))
    assert [fault.split(" ")[0] for fault in found] == ["opd_teacher_load"]
