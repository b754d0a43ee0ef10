from __future__ import annotations

import pathlib

import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig

from miles.services.rollout.engines.sglang.weights.layout import misfits, read_layout


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
