"""RMS norms in one operation each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from miles.services.trainer.backends.fsdp.model.fused_norms import FusedRMSNorm, fuse_norms

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "norms"), [(LlamaConfig(**SIZES), 5), (Qwen3Config(**SIZES, head_dim=8), 9)], ids=["llama", "qwen3"]
)
def test_fused_norms_give_the_outputs_and_gradients_of_stock_ones(config: Any, norms: int) -> None:
    torch.manual_seed(0)
    stock: Any = AutoModelForCausalLM.from_config(config)
    for name, weight in stock.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1.0, 0.3)
    fused = copy.deepcopy(stock)
    assert fuse_norms(fused) == norms
    assert fused.state_dict().keys() == stock.state_dict().keys()
    ids = torch.randint(0, 64, (2, 7))
    outputs = [model(input_ids=ids).logits for model in (stock, fused)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    for logits in outputs:
        logits.log_softmax(-1)[..., 3].sum().backward()
    for (name, left), (_, right) in zip(stock.named_parameters(), fused.named_parameters(), strict=True):
        torch.testing.assert_close(right.grad, left.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_in_bfloat16_fused_norms_round_once_and_stay_within_its_precision_of_stock_ones() -> None:
    torch.manual_seed(0)
    stock: Any = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).model.norm
    torch.nn.init.normal_(stock.weight, 1.0, 0.3)
    model = torch.nn.Sequential(copy.deepcopy(stock))
    assert fuse_norms(model) == 1, "compared in float32"
    stock, fused = stock.bfloat16(), model.bfloat16()
    x = torch.randn(100, SIZES["hidden_size"]).bfloat16()
    exact = FusedRMSNorm(torch.nn.Parameter(stock.weight.double()), stock.variance_epsilon)(x.double())
    half_a_digit = torch.finfo(torch.bfloat16).eps / 2
    torch.testing.assert_close(fused(x).double(), exact, rtol=1.01 * half_a_digit, atol=0)
    assert not fused(x).equal(stock(x))
    torch.testing.assert_close(fused(x).double(), stock(x).double(), rtol=4 * half_a_digit, atol=0)


def test_the_norms_weight_is_the_one_that_is_trained() -> None:
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    weight = model.model.norm.weight
    fuse_norms(model)
    assert isinstance(model.model.norm, FusedRMSNorm)
    assert model.model.norm.weight is weight


class OffsetRMSNorm(torch.nn.Module):
    """A norm with factor 1 + weight, as Gemma's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8))
        self.variance_epsilon = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt() * (1 + self.weight)


def test_norms_of_another_formula_stay() -> None:
    model = torch.nn.Sequential(OffsetRMSNorm())
    assert fuse_norms(model) == 0
    assert isinstance(model[0], OffsetRMSNorm)


def test_the_global_random_state_is_left_as_it_is() -> None:
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    before = torch.get_rng_state()
    fuse_norms(model)
    assert torch.get_rng_state().equal(before)
