"""Which layers of a model are rounded, and which models are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch_engine_models import tiny_config

from miles.precision.emulation.linear import RoundedLinear
from miles.precision.emulation.model import NotEmulated, emulate
from miles.precision.layers import QuantisedLayers
from miles.precision.recipe import Recipe

FP8 = Recipe(format="fp8_block")


def empty(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def rounded(model: Any) -> set[str]:
    """Names of the layers that are rounded, without their number."""
    linear = {name for name, module in model.named_modules() if isinstance(module, RoundedLinear)}
    return linear | {name for name, module in model.named_modules() if hasattr(module, "rounding")}


def test_attention_experts_and_shared_experts_are_rounded_and_keep_their_names() -> None:
    model = empty(tiny_config("deepseek_v3"))
    before = [name for name, _ in model.named_parameters()]
    weight = model.model.layers[1].self_attn.o_proj.weight
    emulate(model, FP8, weights=True)
    assert [name for name, _ in model.named_parameters()] == before
    assert model.model.layers[1].self_attn.o_proj.weight is weight
    attention = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    of_layer_1 = {name.removeprefix("model.layers.1.") for name in rounded(model) if ".1." in name}
    shared = {f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}
    assert of_layer_1 == {f"self_attn.{name}" for name in attention} | {"mlp.experts"} | shared
    assert not {name for name in rounded(model) if "lm_head" in name or "gate." in name}


def test_layers_and_names_that_a_recipe_leaves_out_stay_as_they_are() -> None:
    model = empty(tiny_config("qwen3_moe"))
    layers = QuantisedLayers(but=("o_proj", "down_proj"), high_layers=frozenset({0}))
    emulate(model, Recipe(format="fp8_block", layers=layers), weights=True)
    names = {f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
    assert rounded(model) == names | {"model.layers.1.mlp.experts"}
    rounding = model.model.layers[1].mlp.experts.rounding
    assert rounding.gate_up is not None
    assert rounding.down is None


def test_nothing_is_replaced_where_only_weights_are_rounded_and_these_are_already() -> None:
    model = empty(tiny_config("qwen3_moe"))
    emulate(model, Recipe(format="int4", group_size=32), weights=False)
    assert not rounded(model)


def gpt_oss() -> Any:
    from transformers import GptOssConfig

    return GptOssConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=2,
        vocab_size=97, num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=None,
    )  # fmt: skip


def gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=97)


@pytest.mark.parametrize(
    ("config", "recipe", "message"),
    [
        (gpt_oss(), FP8, r"model.layers.0.mlp.experts \(GptOssExperts\) has experts with biases, transposed"),
        (gpt2(), FP8, "transformer.h.0.attn.c_attn is a Conv1D, not a linear layer"),
        (
            tiny_config("llama"),
            Recipe(format="int4", group_size=64),
            r"model.layers.0.self_attn.q_proj.weight: its rows of 96 are no multiple of the group size 64; .*and \d+ "
            "more; keep them out of the format with extra_high_precision_layers_hf",
        ),
    ],
    ids=["gpt_oss", "gpt2", "group size"],
)
@pytest.mark.parametrize("weights", [True, False])
def test_a_model_with_a_covered_matrix_that_cannot_be_rounded_is_refused_unchanged(
    config: Any, recipe: Recipe, message: str, weights: bool
) -> None:
    model = empty(config)
    with pytest.raises(NotEmulated, match=message):
        emulate(model, recipe, weights=weights)
    assert not rounded(model)
