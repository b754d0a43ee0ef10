"""Folders in FP8 and INT4 as compressed-tensors and SGLang read them, and as they are published."""

from __future__ import annotations

import json
import pathlib
import subprocess
from typing import Any

import pytest
import torch
from megatron_kit import SUPPORT
from quantised_models import RECIPES, write_quantised
from safetensors.torch import load_file
from sglang_kit import CPU_PYTHON, ON_GPU, have_sglang

from miles.precision.quantization_config import recipe_of
from miles.weights.hf_folder.plain_tensors import PlainTensors
from miles.weights.naming.model_tensors import ModelTensors, read_model_tensors

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(ON_GPU or not have_sglang(), reason="the test needs SGLang's installation for the CPU"),
    pytest.mark.timeout(1800),
]

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
PUBLISHED: dict[str, dict[str, Any]] = {
    "MiniMax-M2": {**FP8, "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]},
    "Qwen3-MoE": {**FP8, "modules_to_not_convert": ["lm_head", *(f"model.layers.{n}.mlp.gate" for n in range(4))]},
    "DeepSeek-V3": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {
                    "actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4,
                    "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True,
                    "type": "int",
                },
            }
        },
        "ignore": [
            "lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"
        ],
        "kv_cache_scheme": None,
    },
}  # fmt: skip
"""As in the folders of MiniMax-M2, Qwen3-30B-A3B-FP8 and Kimi-K2-Thinking."""


def covered_by_us(folder: pathlib.Path, model: ModelTensors) -> tuple[list[str], set[str]]:
    """Linear modules of a model, and those that its folder's config.json leaves out."""
    recipe = recipe_of(json.loads((folder / "config.json").read_text()))
    assert recipe is not None
    shapes = model.conversion.checkpoint_shapes(model.module)
    names = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) > 1]
    linear = [name for name in names if name.rpartition(".")[2] not in ("embed_tokens", "lm_head", "gate")]
    return linear, {name for name in linear if not recipe.layers.cover(f"{name}.weight", 2)}


def test_others_read_what_we_write_and_what_is_published(tmp_path: pathlib.Path) -> None:
    root, ours = tmp_path / "all", {}
    for family, published in PUBLISHED.items():
        source = write_quantised(family, tmp_path / family, RECIPES["fp8"])
        model, config = read_model_tensors(source), json.loads((source / "config.json").read_text())
        experts = write_quantised(family, tmp_path / f"{family}-int4", RECIPES["int4, experts"]) / "config.json"
        written = [config["quantization_config"], json.loads(experts.read_text())["quantization_config"]]
        for number, stated in enumerate([published, *written]):
            folder = root / f"{family}-{number}"
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
            linear, ours[folder.name] = covered_by_us(folder, model)
            (folder / "modules.json").write_text(json.dumps(linear))
            assert len(ours[folder.name]) < len(linear)
    dense = write_quantised("Llama", tmp_path / "dense", RECIPES["int4"], torch.bfloat16)
    program, out = str(SUPPORT / "quantised_readers.py"), tmp_path / "out.safetensors"
    command = ["sh", str(CPU_PYTHON), program, str(dense), str(out), str(root)]
    process = subprocess.run(command, text=True, capture_output=True, timeout=1500)
    assert process.returncode == 0, process.stderr[-3000:]

    results = [line.removeprefix("RESULT ") for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    theirs = {found["folder"]: set(found["skipped"]) for found in map(json.loads, results)}
    assert theirs == ours
    found, expected = load_file(out), PlainTensors(dense, torch.bfloat16)
    assert sum(map(expected.is_quantised, expected)) == 28
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
