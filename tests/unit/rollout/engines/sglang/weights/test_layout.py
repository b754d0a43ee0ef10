from __future__ import annotations

import pathlib

import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig

from miles.services.rollout.engines.sglang.weights.layout import ModelLayout, read_layout
from miles.weights.naming.contract import WeightContract

CHECKPOINT = WeightContract(form="checkpoint")


@pytest.mark.parametrize("tied", [True, False])
def test_tied_parameters_are_known_by_every_name(tmp_path: pathlib.Path, tied: bool) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied).save_pretrained(tmp_path)
    layout = read_layout(str(tmp_path), CHECKPOINT)
    assert dict(layout.aliases) == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    assert ("lm_head.weight" in layout.shapes) is not tied


def test_a_model_that_sglang_would_build_otherwise_is_refused(tmp_path: pathlib.Path) -> None:
    Qwen3MoeConfig(num_hidden_layers=2, mlp_only_layers=[0]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gives every layer of a qwen3_moe experts"):
        read_layout(str(tmp_path), CHECKPOINT)


def test_weights_of_another_form_or_type_are_refused_with_what_was_wanted() -> None:
    layout = ModelLayout({"a": (2, 2), "b": (3,)}, 8, 8)
    good = {"a": torch.zeros(2, 2), "b": torch.zeros(3)}
    layout.refuse_misfits(good, torch.bfloat16)
    layout.refuse_misfits({name: tensor.bfloat16() for name, tensor in good.items()}, torch.bfloat16)
    with pytest.raises(ValueError, match=r"b \(3,\) is missing; c \(1,\) is none of .* in the checkpoint form"):
        layout.refuse_misfits({"a": good["a"], "c": torch.zeros(1)}, torch.float32)
    with pytest.raises(ValueError, match=r"b has shape \(4,\) instead of \(3,\)"):
        layout.refuse_misfits(good | {"b": torch.zeros(4)}, torch.float32)
    with pytest.raises(ValueError, match=r"a is torch\.float16 instead of torch\.bfloat16"):
        layout.refuse_misfits({name: tensor.half() for name, tensor in good.items()}, torch.bfloat16)
