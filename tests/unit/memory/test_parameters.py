"""The numbers of parameters by kind, against the models that transformers builds."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from megatron_models import FAMILIES, config_of

from miles.memory.model import shape_of
from miles.memory.parameters import active_parameters, model_parameters, mtp_parameters
from miles.weights.naming.model_tensors import read_model_tensors

KINDS = {
    "embedding": ("embed_tokens",),
    "head": ("lm_head",),
    "experts": (".experts.",),
    "shared": ("shared_expert.", "shared_experts."),
    "router": (".gate.", ".router.", "shared_expert_gate", "e_score_correction_bias"),
    "norms": ("norm.", "norm.weight", "o_proj.bias"),
    "key_values": ("k_proj", "v_proj"),
    "replicated": ("q_a_proj", "kv_a_proj"),
    "attention": ("self_attn.", "eh_proj", "input_proj"),
    "dense": (".mlp.", ".feed_forward."),
}
"""Parts of a tensor's name by kind; the first that fits counts."""


def kind_of(name: str) -> str:
    return next(kind for kind, parts in KINDS.items() if any(part in name for part in parts))


def counted(shapes: Any) -> dict[str, int]:
    found = dict.fromkeys(KINDS, 0)
    for name, shape in shapes.items():
        count = 1
        for length in shape:
            count *= length
        found[kind_of(name)] += count
    return found


def test_a_model_with_widths_of_each_layer_has_no_estimate(tmp_path: pathlib.Path) -> None:
    config_of("Gemma 3n").save_pretrained(tmp_path)
    assert shape_of(json.loads((tmp_path / "config.json").read_text())) is None


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "Gemma 3n"])
def test_every_kind_is_counted_exactly(tmp_path: pathlib.Path, family: str) -> None:
    config_of(family).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    shape, tensors = shape_of(config), read_model_tensors(tmp_path)
    assert shape is not None
    found = model_parameters(shape)
    assert {kind: getattr(found, kind) for kind in KINDS} == counted(tensors.module)
    if shape.mtp_layers:
        assert mtp_parameters(shape).total * shape.mtp_layers == sum(counted(tensors.mtp).values())


def test_deepseek_v3_has_671_billion_parameters_of_which_37_are_active() -> None:
    shape = shape_of(json.loads((pathlib.Path(__file__).parents[2] / "support/deepseek_v3.json").read_text()))
    assert shape is not None
    found = model_parameters(shape)
    assert found.total == 671_026_419_200  # 671B, arXiv 2412.19437, with the routers' biases
    assert found.experts == 58 * 256 * 3 * 7168 * 2048
    assert 37e9 < active_parameters(shape) < 38e9
    assert 684.4e9 < model_parameters(shape, mtp_layers=1).total + 2 * found.embedding < 684.6e9  # with its copies
