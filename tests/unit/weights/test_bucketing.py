"""Splitting a version's tensors into buckets."""

from __future__ import annotations

import dataclasses

import pytest

from miles.weights.bucketing import buckets


@dataclasses.dataclass(frozen=True)
class Tensor:
    name: str
    nbytes: int = 10


def test_a_bucket_holds_as_many_neighbours_as_fit_and_a_large_tensor_is_alone() -> None:
    tensors = [Tensor("a"), Tensor("b"), Tensor("c", 30), Tensor("d")]
    assert list(buckets(tensors, 20)) == [tensors[:2], tensors[2:3], tensors[3:]]


@pytest.mark.parametrize("limit", [5, 10, 15, 25, 35, 100])
def test_low_rank_projections_of_one_layer_are_in_one_bucket(limit: int) -> None:
    names = ("input_layernorm", "self_attn.q_a_proj", "self_attn.q_a_layernorm", "self_attn.q_b_proj")
    names += ("self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj", "self_attn.o_proj")
    tensors = [Tensor(f"model.layers.{layer}.{name}.weight") for layer in range(2) for name in names]
    parts = list(buckets(tensors, limit))
    assert [tensor for part in parts for tensor in part] == tensors
    for layer in range(2):
        pair = {f"model.layers.{layer}.self_attn.{name}.weight" for name in ("q_a_proj", "kv_a_proj_with_mqa")}
        assert sum(bool(pair & {tensor.name for tensor in part}) for part in parts) == 1
    assert limit > 10 or len(parts) == len(tensors) - 6  # everything else is alone


def test_projections_of_two_layers_may_be_apart() -> None:
    tensors = [Tensor(f"model.layers.{layer}.self_attn.q_a_proj.weight") for layer in range(3)]
    assert [len(part) for part in buckets(tensors, 10)] == [1, 1, 1]
