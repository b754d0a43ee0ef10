"""A tiny random Llama model, to be enlarged in ways that keep its answers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 96


def dense_model(**changes: Any) -> LlamaForCausalLM:
    """Three layers of random weights, the norms' too; `changes` are of its configuration."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 3, "num_key_value_heads": 1, "initializer_range": 0.2, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-4,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**sizes | changes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.1)  # a norm that is left out or mistaken for another one shows
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of two sequences of 29 tokens, (2, 29, VOCABULARY)."""
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(2 * 29).view(2, 29) * 7 % VOCABULARY).logits
    return found
