"""Exports in the engines' format need engines that have one, and a form of folders for it."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from config_cases import MINIMAL

from miles.config.checks.export_format import export_faults
from miles.config.job import examine

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("changes", "model", "expected"),
    [
        ({"save_hf_format": "rollout"}, {}, "the engines' weights are not quantised"),
        (
            {"save_hf_format": "rollout", "rollout_weight_format": "as_trained"},
            {"quantization_config": FP8},
            "the engines' weights are not quantised",
        ),
        (
            {"save_hf_format": "rollout", "rollout_weight_format": "nvfp4"},
            {},
            "Hugging Face folders do not have weights in nvfp4",
        ),
        ({"save_hf_format": "rollout"}, {"quantization_config": FP8}, None),
        ({"save_hf_format": "rollout", "rollout_weight_format": "int4"}, {}, None),
        ({}, {"quantization_config": FP8}, None),
    ],
)
def test_a_form_that_cannot_be_written_is_refused(
    tmp_path: pathlib.Path, changes: dict[str, Any], model: dict[str, Any], expected: str | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **model}))
    settings = examine({**MINIMAL, "hf_checkpoint": str(tmp_path), **changes}).settings
    found = [str(fault) for fault in export_faults(settings)]
    assert len(found) == (expected is not None)
    assert expected is None or expected in found[0]
