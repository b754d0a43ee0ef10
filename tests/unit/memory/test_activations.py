"""What a forward pass keeps for the backward pass, against the tensors that autograd keeps of transformers' models."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from megatron_models import config_of

from miles.memory.activations import layer_elements, rounded_elements
from miles.memory.held import covered_parameters
from miles.memory.megatron import Layout
from miles.memory.model import ModelShape, shape_of
from miles.memory.tensors import layer_tensors
from miles.precision.emulation.experts import PADDED
from miles.precision.emulation.model import emulate
from miles.precision.recipe import Recipe

TOKENS = 160
SIZES = {
    "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
    "num_hidden_layers": 2,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 64, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32,
    "num_key_value_heads": 8, "head_dim": 16,
}  # fmt: skip


def kept(model: Any) -> int:
    """Bytes that autograd keeps for one sequence, without weights, and without attention matrices: flash attention has
    none, and where sizes of heads differ a CPU has no other kernel."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tuple(tensor.shape[-2:]) != (TOKENS, TOKENS):
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # a tensor that lives keeps its address to itself
        return tensor

    tokens = torch.arange(TOKENS)[None] % 90 + 3
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits.sum()
    return sum(nbytes for nbytes, _ in found.values())


def model_of(family: str, dtype: torch.dtype) -> tuple[Any, ModelShape]:
    experts = {"moe_intermediate_size": 192} if family in ("Qwen3-MoE", "DeepSeek-V3") else {}
    config = config_of(family, **{**SIZES, **(LATENT if family == "DeepSeek-V3" else {}), **experts})
    model = getattr(transformers, type(config).__name__.removesuffix("Config") + "ForCausalLM")(config).to(dtype)
    shape = shape_of(json.loads(config.to_json_string(use_diff=False)))
    assert shape is not None
    return model, shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Qwen3-MoE", "Gemma 2", "DeepSeek-V3"])
def test_activations_are_estimated_from_below_within_a_third(family: str, dtype: torch.dtype) -> None:
    model, shape = model_of(family, dtype)
    norm = 3 if dtype is torch.float32 else 4
    estimated = sum(
        layer_elements(shape, layer, Layout(1), sequence_parallel=False, norm_elements=norm)
        for layer in range(shape.layers)
    )
    assert 1 <= kept(model) / (estimated * TOKENS * dtype.itemsize) < 1.3


@pytest.mark.parametrize("recipe", [Recipe(format="int4", group_size=8), Recipe(format="fp8_block")], ids=str)
@pytest.mark.parametrize("family", ["Llama", "Qwen3-MoE", "DeepSeek-V3"])
def test_rounded_weights_and_inputs_are_estimated_within_a_tenth(family: str, recipe: Recipe) -> None:
    """Where every forward pass rounds, as of shards: what it rounded is there until the backward pass."""
    model, shape = model_of(family, torch.float32)
    if shape.experts:
        model.set_experts_implementation(PADDED)
    plain = kept(model)
    emulate(model, recipe, weights=True)
    layers = [layer_tensors(shape, layer) for layer in range(shape.layers)]
    weights = sum(covered_parameters(tensors, recipe).total for tensors in layers)
    inputs = sum(rounded_elements(shape, layer, Layout(1), fused=False) for layer in range(shape.layers))
    estimated = 4 * (weights + TOKENS * inputs * recipe.rounds_inputs)
    assert 0.9 < (kept(model) - plain) / estimated < 1.1
