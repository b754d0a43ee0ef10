"""Routing of each known kind of mixture of experts: replayed as the model's own router would have it."""

from __future__ import annotations

import pathlib

import pytest
import torch
from megatron_models import EXPERTS, TOP_K, write_model
from transformers import AutoModelForCausalLM

from miles.services.trainer.backends.fsdp.replay.moe_layers import find_moe_layers
from miles.services.trainer.backends.fsdp.replay.observer import RoutingObserver
from miles.services.trainer.backends.fsdp.replay.router import RoutingReplay

LAYERS = {
    "Qwen2-MoE": 4,
    "Qwen3-MoE": 4,
    "MiniMax-M2": 4,
    "DeepSeek-V3": 3,
    "DeepSeek-V3.2": 3,
    "GLM-4.5": 3,
    "GLM-4.7-Flash": 3,
}
"""Mixture-of-experts layers of each family's tiny model; the last four begin with a dense one."""
TOKENS = torch.arange(3, 32)[None]


@pytest.fixture(scope="module", params=list(LAYERS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    folder = write_model(request.param, tmp_path_factory.mktemp("model"))
    found: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found.layers_expected = LAYERS[request.param]
    with torch.no_grad():
        for name, buffer in found.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)  # decides who is chosen, and must not enter the weights
    return found


def logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(TOKENS).logits
    return found


def test_its_own_choice_replayed_changes_nothing(model: torch.nn.Module) -> None:
    free = logits(model)
    replay = RoutingReplay(model)
    observer = RoutingObserver(model)
    replay.record()
    logits(model)
    chosen = replay.recorded()
    assert chosen.shape == (TOKENS.numel(), model.layers_expected, TOP_K)
    replay.replay(chosen)
    observer.expect(chosen)
    torch.testing.assert_close(logits(model), free, rtol=0, atol=1e-5)
    observer.stop()
    assert replay.take_difference() == (0.0, TOKENS.numel() * model.layers_expected)
    assert observer.take() == (0, TOKENS.numel())


def test_another_choice_is_computed_and_trains_the_router(model: torch.nn.Module) -> None:
    free = logits(model)
    replay = RoutingReplay(model)
    replay.replay(torch.arange(TOP_K).expand(TOKENS.numel(), model.layers_expected, TOP_K))
    observer = RoutingObserver(model)
    observer.expect(torch.arange(1, TOP_K + 1).expand(TOKENS.numel(), model.layers_expected, TOP_K))
    changed = logits(model)
    observer.stop()
    assert (changed - free).abs().max() > 0.1
    assert observer.take() == (TOKENS.numel(), TOKENS.numel())
    model.zero_grad()
    changed.logsumexp(-1).sum().backward()
    for layer in find_moe_layers(model):
        gradient = layer.gate.weight.grad
        assert isinstance(gradient, torch.Tensor)
        assert gradient[:TOP_K].abs().max() > 0
        assert layer.experts.num_experts == EXPERTS


@pytest.mark.parametrize(("family", "name"), [("Llama", "LlamaForCausalLM"), ("Llama 4", "Llama4ForCausalLM")])
def test_a_model_without_a_known_router_is_refused(tmp_path: pathlib.Path, family: str, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_model(family, tmp_path))
    with pytest.raises(ValueError, match=f"{name} has no router"):
        find_moe_layers(model)
