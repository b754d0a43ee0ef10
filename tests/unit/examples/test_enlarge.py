from __future__ import annotations

from typing import Any

import pytest
import torch

from examples.smollm2_chain_sum.enlarge import enlarged

SIZES: dict[str, int] = {"hidden": 96, "feed_forward": 160, "heads": 8, "kv_heads": 2}


def small(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 3, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=50, num_hidden_layers=2, tie_word_embeddings=True, **sizes | changes)
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("layers", [None, 5])
def test_the_large_model_gives_the_same_logits(layers: int | None) -> None:
    model, tokens = small(), torch.arange(20)[None]
    large = enlarged(model, **SIZES, layers=layers)
    assert large.config.num_hidden_layers == (layers or 2)
    with torch.no_grad():
        assert torch.allclose(large(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_training_moves_what_the_small_model_has_alone() -> None:
    model, tokens = small(), torch.arange(20)[None]
    large = enlarged(model, **SIZES)
    large(input_ids=tokens, labels=tokens).loss.backward()
    gate, query = large.model.layers[0].mlp.gate_proj.weight, large.model.layers[0].self_attn.q_proj.weight
    assert gate.grad[:64, :48].abs().max() > 0
    assert query.grad[:48, :48].abs().max() > 0
    assert not gate.grad[64:].any()
    assert not gate.grad[:, 48:].any()
    assert not query.grad[48:].any()
    assert not query.grad[:, 48:].any()
    assert not large.model.embed_tokens.weight.grad[:, 48:].any()


@pytest.mark.parametrize("sizes", [{"hidden": 32}, {"heads": 9}, {"heads": 4, "kv_heads": 2}, {"layers": 1}])
def test_sizes_that_cannot_hold_the_small_model_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"the model has|a pair has to serve"):
        enlarged(small(), **SIZES | sizes)
