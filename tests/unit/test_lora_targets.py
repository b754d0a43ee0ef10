"""Hugging Face's names of layers as Megatron-Core's, which hold several of them."""

from __future__ import annotations

import pytest

from miles.lora_targets import fused_targets


@pytest.mark.parametrize(
    ("targets", "excluded", "expected"),
    [
        (None, None, ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]),
        ("all-linear", "down_proj", ["linear_qkv", "linear_proj", "linear_fc1"]),
        ("v_proj, q_proj, k_proj", None, ["linear_qkv"]),
        ("o_proj,gate_proj,up_proj", None, ["linear_proj", "linear_fc1"]),
    ],
)
def test_names_that_fill_matrices_are_theirs(targets: str | None, excluded: str | None, expected: list[str]) -> None:
    assert fused_targets(targets, excluded) == expected


@pytest.mark.parametrize(
    ("targets", "excluded", "problem"),
    [
        ("q_proj,v_proj", None, "q_proj, k_proj, v_proj are one matrix in Megatron-Core"),
        ("all-linear", "up_proj", "gate_proj, up_proj are one matrix"),
        ("lm_head", None, "lm_head is none of q_proj"),
        ("o_proj", "o_proj", "no layer is left"),
    ],
)
def test_parts_of_matrices_and_other_layers_are_refused(targets: str, excluded: str | None, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        fused_targets(targets, excluded)
