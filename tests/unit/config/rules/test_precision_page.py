"""The tables of docs/precision.md say what the rules do."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from config_cases import MINIMAL

from miles.config.checks.precision import precision_faults
from miles.config.job import examine
from miles.config.rules.precision import why_emulated

PAGE = pathlib.Path(__file__).parents[4] / "docs" / "precision.md"
TRAINERS: dict[str, dict[str, Any]] = {
    "train_dtype": {},
    "--fp8-recipe blockwise": {"fp8_format": "e4m3", "fp8_recipe": "blockwise"},
    "--fp8-recipe mxfp8": {"fp8_format": "e4m3", "fp8_recipe": "mxfp8"},
    "--fp4-format e2m1": {"fp4_format": "e2m1"},
    "--int4-qat": {"int4_qat": True},
}
ENGINES = ("as_trained", "fp8_block", "int4", "mxfp8", "nvfp4")
FOLDERS: dict[str, dict[str, Any]] = {
    "FP8 blocks": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "INT4 groups": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 64}}},
    },
}


def table(head: str) -> list[list[str]]:
    """Rows of the page's table whose first column has this head, without back quotes."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(f"| {head} |")) + 2
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    return rows


@pytest.mark.parametrize("row", table("trainer"), ids=" ".join)
def test_trainer_and_engines_go_together_as_the_page_says(row: list[str]) -> None:
    trainer, engines, *cells = row
    for backend, cell in zip(("torch", "sglang"), cells, strict=True):
        flat = {**MINIMAL, **TRAINERS[trainer], "rollout_backend": backend, "device": "cuda"}
        faults = examine({**flat, "rollout_weight_format": engines}).faults
        assert (not faults) == (cell == "yes"), faults


def test_what_the_page_leaves_out_is_refused() -> None:
    said = {(trainer, engines) for trainer, engines, *_ in table("trainer")}
    for trainer, settings in TRAINERS.items():
        for engines in ENGINES:
            if (trainer, engines) not in said:
                assert examine({**MINIMAL, **settings, "rollout_weight_format": engines}).faults


@pytest.mark.parametrize("row", table("weights of `hf_checkpoint`")[1:], ids=" ".join)
def test_a_folder_goes_with_what_the_page_says(row: list[str], tmp_path: pathlib.Path) -> None:
    folder, trainers, engines = row
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": FOLDERS[folder]}))
    named = tuple(each.strip() for each in trainers.split(","))
    served = tuple(each.strip() for each in engines.split(","))
    base = {**MINIMAL, "hf_checkpoint": str(tmp_path)}
    for trainer, settings in TRAINERS.items():
        faults = list(precision_faults(examine(base | settings).settings))
        assert (not faults) == (trainer in named), faults
    for each in ENGINES:
        faults = list(precision_faults(examine({**base, "rollout_weight_format": each}).settings))
        assert (not faults) == (each in served), faults


@pytest.mark.parametrize("row", table("trainer's format"), ids=" ".join)
def test_what_is_emulated_is_what_the_page_says(row: list[str]) -> None:
    places = (
        {"train_backend": "fsdp"},
        {"train_backend": "megatron", "device": "cpu"},
        {"train_backend": "megatron", "device": "cuda"},
    )
    for place, cell in zip(places, row[1:], strict=True):
        settings = examine({**MINIMAL, **TRAINERS[row[0]], **place}).settings
        assert (why_emulated(settings) is not None) == (cell == "emulated")
