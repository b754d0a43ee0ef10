from __future__ import annotations

import base64
import pathlib
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, Qwen3MoeConfig

from miles.services.rollout.engines.sglang.weights.buckets import flatten, in_buckets, share_by_name
from miles.services.rollout.engines.sglang.weights.layout import misfits, read_layout
from miles.services.rollout.engines.sglang.weights.names import checkpoint_names


def test_fused_experts_come_apart_gate_first() -> None:
    gate_up = torch.arange(2 * 6 * 4, dtype=torch.float32).view(2, 6, 4)
    down = torch.arange(2 * 4 * 3, dtype=torch.float32).view(2, 4, 3)
    named = {
        "model.layers.0.mlp.experts.gate_up_proj": gate_up,
        "model.layers.0.mlp.experts.down_proj": down,
        "model.layers.0.mlp.gate.weight": torch.zeros(2, 4),
    }
    found = dict(checkpoint_names(named.items()))
    prefix = "model.layers.0.mlp.experts"
    assert set(found) == {
        *(f"{prefix}.{i}.{kind}.weight" for i in (0, 1) for kind in ("gate_proj", "up_proj", "down_proj")),
        "model.layers.0.mlp.gate.weight",
    }
    assert torch.equal(found[f"{prefix}.1.gate_proj.weight"], gate_up[1, :3])
    assert torch.equal(found[f"{prefix}.1.up_proj.weight"], gate_up[1, 3:])
    assert torch.equal(found[f"{prefix}.0.down_proj.weight"], down[0])


def test_dense_names_are_left_alone() -> None:
    named = {"model.layers.0.mlp.gate_up_proj.weight": torch.zeros(2, 2), "lm_head.weight": torch.zeros(2, 2)}
    assert list(checkpoint_names(named.items())) == list(named.items())


@given(sizes=st.lists(st.integers(0, 40), max_size=20), limit=st.integers(1, 100))
def test_buckets_hold_everything_in_order_and_keep_to_their_size(sizes: list[int], limit: int) -> None:
    tensors = [(str(i), torch.zeros(size, dtype=torch.uint8)) for i, size in enumerate(sizes)]
    parts = list(in_buckets(tensors, limit))
    assert [name for part in parts for name, _ in part] == [name for name, _ in tensors]
    for part in parts:
        assert len(part) == 1 or sum(tensor.nbytes for _, tensor in part) <= limit


def test_a_bucket_holds_its_tensors_bit_for_bit_and_another_process_can_read_it() -> None:
    share_by_name()
    tensors = [
        ("a", torch.randn(3, 5)),
        ("b", torch.randn(7, dtype=torch.float32).to(torch.bfloat16)),
        ("c", torch.tensor(2.5)),
        ("d", torch.arange(12, dtype=torch.float32).view(3, 4).t()),
        ("e", torch.empty(0)),
    ]
    bucket = flatten(tensors)
    read = pickle.loads(base64.b64decode(bucket.serialized()))  # as the server does, with its own unpickler
    for entry, (name, tensor) in zip(read["metadata"], tensors, strict=True):
        part = read["flattened_tensor"][entry.start_idx : entry.end_idx].view(entry.dtype).reshape(entry.shape)
        assert entry.name == name
        assert entry.numel == tensor.nbytes
        assert torch.equal(part, tensor)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_parameters_are_known_by_every_name(tmp_path: pathlib.Path, tied: bool) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied).save_pretrained(tmp_path)
    layout = read_layout(str(tmp_path))
    assert dict(layout.aliases) == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    assert ("lm_head.weight" in layout.shapes) is not tied


def test_a_model_that_sglang_would_build_otherwise_is_refused(tmp_path: pathlib.Path) -> None:
    Qwen3MoeConfig(num_hidden_layers=2, mlp_only_layers=[0]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gives every layer of a qwen3_moe experts"):
        read_layout(str(tmp_path))


def test_weights_that_do_not_fit_are_named() -> None:
    shapes = {"a": (2, 2), "b": (3,)}
    good = {"a": torch.zeros(2, 2), "b": torch.zeros(3)}
    assert misfits(shapes, good, torch.float32) == []
    assert misfits(shapes, {"a": good["a"]}, torch.float32) == ["b is missing"]
    assert misfits(shapes, good | {"c": torch.zeros(1)}, torch.float32) == ["c is no parameter of the model"]
    assert misfits(shapes, good | {"b": torch.zeros(4)}, torch.float32) == ["b has shape (4,) instead of (3,)"]
    half = {name: tensor.half() for name, tensor in good.items()}
    assert len(misfits(shapes, half, torch.bfloat16)) == 2
