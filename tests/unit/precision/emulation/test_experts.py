"""Mixture-of-experts layers that see at least 16 rows."""

from __future__ import annotations

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from miles.precision.emulation.experts import PADDED


def experts(dtype: torch.dtype) -> tuple[Qwen3MoeExperts, Qwen3MoeConfig]:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=96, moe_intermediate_size=32, num_experts=6, num_experts_per_tok=2)
    module = Qwen3MoeExperts(config)
    torch.nn.init.normal_(module.gate_up_proj, std=0.2)
    torch.nn.init.normal_(module.down_proj, std=0.2)
    return module.to(dtype).requires_grad_(False), config


def test_padded_experts_equal_the_stock_ones() -> None:
    module, config = experts(torch.float32)
    hidden, weights = torch.randn(40, 96), torch.rand(40, 2)
    chosen = torch.rand(40, 6).topk(2).indices
    config._experts_implementation = "eager"
    expected = module(hidden, chosen, weights)
    config._experts_implementation = PADDED
    torch.testing.assert_close(module(hidden, chosen, weights), expected, atol=1e-5, rtol=0)


def test_a_token_comes_out_the_same_whatever_tokens_are_beside_it() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        module, config = experts(dtype)
        config._experts_implementation = PADDED
        hidden, weights = torch.randn(200, 96).to(dtype), torch.rand(200, 2).to(dtype)
        chosen = torch.rand(200, 6).topk(2).indices
        together = module(hidden, chosen, weights)
        for rows in (1, 5, 37):
            assert torch.equal(module(hidden[:rows], chosen[:rows], weights[:rows]), together[:rows])
