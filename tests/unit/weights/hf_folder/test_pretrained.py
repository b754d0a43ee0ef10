"""A quantised folder gives the model that a folder with its dequantised weights gives."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
from quantised_models import RECIPES, write_quantised

from miles.services.rollout.engines.checkpoint_weights import read_weights
from miles.services.trainer.checkpoint.plain_model import write_plain_model
from miles.weights.base import WeightsRefused
from miles.weights.hf_folder.model_config import read_model_config
from miles.weights.hf_folder.plain_tensors import PlainTensors
from miles.weights.hf_folder.pretrained import read_model
from miles.weights.naming.model_tensors import read_model_tensors

CASES = [
    ("Llama, tied", "fp8"),
    ("Qwen3-MoE", "int4, experts"),
    ("DeepSeek-V3, MTP", "fp8"),
    ("GLM-4.5", "int4"),
    ("MiniMax-M2", "fp8"),
]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_model_is_that_of_dequantised_weights(tmp_path: pathlib.Path, family: str, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_quantised(family, tmp_path / "model", RECIPES[kind])
    write_plain_model(folder, tmp_path / "plain", torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=dtype)
        model = read_model(folder, dtype)
        found, expected = model.state_dict(), stock.state_dict()
        assert found.keys() == expected.keys()
        assert all(found[name].dtype == tensor.dtype for name, tensor in expected.items())
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        buffers = dict(stock.named_buffers())
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
        assert not hasattr(model, "hf_quantizer")
        assert type(model) is type(stock)


def test_engines_read_what_the_parts_stand_for(tmp_path: pathlib.Path) -> None:
    folder = write_quantised("Llama", tmp_path / "model", RECIPES["int4"])
    stored, found = PlainTensors(folder, torch.bfloat16), read_weights(str(folder), "bfloat16")
    assert found.keys() == set(stored)
    assert all(torch.equal(tensor, stored[name].bfloat16()) for name, tensor in found.items())


def test_names_and_shapes_are_those_of_the_plain_model(tmp_path: pathlib.Path) -> None:
    folder = write_quantised("Qwen3-MoE", tmp_path / "model", RECIPES["int4"])
    found, expected = (read_model_tensors(each) for each in (folder, tmp_path / "model-source"))
    assert found.module == expected.module
    assert not hasattr(read_model_config(folder), "quantization_config")


def rename_quantisation(folder: pathlib.Path, name: str | None) -> None:
    config = json.loads((folder / "config.json").read_text())
    stated = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config if name is None else {**config, name: stated}))


def test_the_older_name_of_the_quantisation_is_read(tmp_path: pathlib.Path) -> None:
    folder = write_quantised("Llama", tmp_path / "model", RECIPES["int4"])
    expected = read_model(folder, torch.float32).state_dict()
    rename_quantisation(folder, "compression_config")
    found = read_model(folder, torch.float32).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not hasattr(read_model_config(folder), "compression_config")
    write_plain_model(folder, tmp_path / "plain", torch.float32)
    assert "compression_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_no_model_is_made_of_parts_that_config_json_does_not_speak_of(tmp_path: pathlib.Path) -> None:
    folder = write_quantised("Llama", tmp_path / "model", RECIPES["int4"])
    rename_quantisation(folder, None)
    with pytest.raises(WeightsRefused, match=r"weight_packed and .* says no quantization_config"):
        read_model(folder, torch.float32)
