"""Folders in a form that cannot be trained are refused before the start, with the way out."""

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


INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
        }
    },
    "ignore": ["lm_head", "re:.*self_attn.*"],
}


@pytest.mark.parametrize("quantised", [FP8, INT4])
def test_known_formats_are_read_as_they_are(tmp_path: pathlib.Path, quantised: dict[str, Any]) -> None:
    assert faults(tmp_path, {"model_type": "deepseek_v3", "quantization_config": quantised}) == []


def test_other_quantised_weights_are_refused(tmp_path: pathlib.Path) -> None:
    for quantised in ({"quant_method": "gptq"}, {**FP8, "weight_block_size": None}, {**INT4, "format": "dense"}):
        (found,) = faults(tmp_path, {"model_type": "llama", "quantization_config": quantised})
        assert "but its " in found
        assert found.endswith("in FP8 blocks of 128 x 128, or in INT4 groups")
    (found,) = faults(tmp_path, {"model_type": "llama", "compression_config": {**INT4, "format": "dense"}})
    assert "but its compressed-tensors weights are dense" in found


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
    quantised = {"model_type": "deepseek_v3", "quantization_config": {"quant_method": "gptq"}}
    found = faults(tmp_path / "teacher", quantised, **folders, opd_teacher_load=str(tmp_path / "teacher"))
    assert [fault.split(" ")[0] for fault in found] == ["opd_teacher_load"]
