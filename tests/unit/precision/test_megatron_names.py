"""Megatron-Core's names of modules leave out the matrices of a Hugging Face model that they hold."""

from __future__ import annotations

import pytest

from miles.precision.layers import QuantisedLayers
from miles.precision.megatron_names import ModulePattern, is_kept, modules_of


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        (
            "model.layers.3.self_attn.q_proj.weight",
            ("decoder.layers.3.self_attention.linear_qkv", "decoder.layers.3.self_attention.linear_q_proj"),
        ),
        ("model.layers.0.self_attn.o_proj", ("decoder.layers.0.self_attention.linear_proj",)),
        ("model.layers.0.self_attn.kv_b_proj.weight", ("decoder.layers.0.self_attention.linear_kv_up_proj",)),
        ("model.layers.12.mlp.up_proj.weight", ("decoder.layers.12.mlp.linear_fc1",)),
        ("model.layers.1.mlp.experts.31.down_proj.weight", ("decoder.layers.1.mlp.experts.linear_fc2",)),
        ("model.layers.1.block_sparse_moe.experts.0.w3.weight", ("decoder.layers.1.mlp.experts.linear_fc1",)),
        ("model.layers.1.mlp.shared_expert.gate_proj.weight", ("decoder.layers.1.mlp.shared_experts.linear_fc1",)),
        ("model.layers.1.self_attn.indexer.wk.weight", ("decoder.layers.1.self_attention.indexer.wk",)),
        ("lm_head.weight", ()),
    ],
)
def test_a_matrix_has_its_modules_name(name: str, modules: tuple[str, ...]) -> None:
    assert modules_of(name) == modules


def test_the_first_pattern_that_matches_decides() -> None:
    patterns = (ModulePattern("*layers.0.mlp*", kept=False), ModulePattern("*.mlp.*", kept=True))
    assert not is_kept(patterns, "model.layers.0.mlp.up_proj.weight")
    assert is_kept(patterns, "model.layers.1.mlp.up_proj.weight")
    assert not is_kept(patterns, "model.layers.1.self_attn.q_proj.weight")


def test_layers_leave_out_what_patterns_keep() -> None:
    layers = QuantisedLayers(modules=(ModulePattern("*.shared_experts.linear_fc1*", kept=True),))
    assert not layers.cover("model.layers.1.mlp.shared_experts.up_proj.weight", 2)
    assert layers.cover("model.layers.1.mlp.shared_experts.down_proj.weight", 2)
    assert layers.cover("model.layers.1.mlp.experts.gate_up_proj", 3)
