"""The learning-rate schedule and gradient clipping."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from miles.config.sections.optimizer import OptimizerConfig
from miles.services.trainer.backends.fsdp.optimizer import LossScale, build_optimizer, clip_gradients
from miles.services.trainer.step.learning_rate import learning_rate


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {0: 1.0, 99: 1.0}),
        ({"lr_warmup_iters": 4}, {0: 0.25, 3: 1.0, 4: 1.0}),
        ({"lr_warmup_iters": 4, "lr_warmup_init": 0.2}, {0: 0.4, 3: 1.0}),
        ({"lr_decay_style": "linear", "min_lr": 0.2}, {0: 1.0, 50: 0.6, 100: 0.2, 500: 0.2}),
        ({"lr_decay_style": "cosine", "lr_decay_iters": 10}, {0: 1.0, 5: 0.5, 10: 0.0}),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 20}, {0: 1.0, 80: 1.0, 90: 2 * 0.5**0.5 - 1, 100: 0.0}),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 20, "lr_wsd_decay_style": "minus_sqrt", "min_lr": 0.2},
            {79: 1.0, 85: 0.6, 100: 0.2},
        ),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 20, "lr_wsd_decay_style": "linear", "lr_warmup_iters": 4},
            {3: 1.0, 80: 1.0, 95: 0.25},
        ),
        ({"lr_decay_style": "inverse-square-root", "lr_warmup_iters": 4}, {3: 1.0, 4: 1.0, 16: 0.5, 64: 0.25}),
        ({"lr_decay_style": "linear", "lr_warmup_fraction": 0.1}, {9: 1.0, 10: 1.0, 55: 0.5, 100: 0.0}),
    ],
)
def test_the_learning_rate_follows_its_schedule(settings: dict[str, Any], expected: dict[int, float]) -> None:
    config = OptimizerConfig(lr=1.0, **settings)
    for iteration, rate in expected.items():
        assert learning_rate(iteration, config, total_iterations=100) == pytest.approx(rate)


def optimizer_with_gradient(gradient: list[float]) -> torch.optim.Optimizer:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor(gradient)
    return torch.optim.SGD([weight], lr=1.0)


def gradient_of(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    gradient: torch.Tensor = optimizer.param_groups[0]["params"][0].grad
    return gradient


def test_gradients_are_scaled_down_to_the_limit_and_no_further() -> None:
    optimizer = optimizer_with_gradient([3.0, 4.0])
    assert LossScale(dynamic=False).unscale(optimizer) == pytest.approx(5.0)
    clip_gradients(optimizer, 5.0, 10.0)
    clip_gradients(optimizer, 5.0, 0.0)
    assert gradient_of(optimizer).tolist() == [3.0, 4.0]
    clip_gradients(optimizer, 5.0, 1.0)
    assert gradient_of(optimizer).norm().item() == pytest.approx(1.0, abs=1e-5)


def test_a_smaller_scale_does_not_help_where_there_is_none() -> None:
    scale = LossScale(dynamic=False)
    assert math.isnan(scale.unscale(optimizer_with_gradient([float("nan"), 4.0])))
    assert not scale.back_off()
    assert scale.value == 1


def test_a_dynamic_scale_skips_an_overflow_and_grows_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossScale, "GROWTH_INTERVAL", 2)
    scale = LossScale(dynamic=True)
    first = scale.value
    assert scale.unscale(optimizer_with_gradient([float("inf"), 0.0])) == math.inf
    assert scale.back_off()
    assert scale.value == first / 2
    for _ in range(2):
        assert scale.unscale(optimizer_with_gradient([3 * scale.value, 4 * scale.value])) == pytest.approx(5.0)
    assert scale.value == first
    while scale.value > 1:
        assert scale.back_off()
    assert not scale.back_off()


def test_vectors_are_not_decayed() -> None:
    layer = torch.nn.Linear(2, 2)
    decays = {
        id(p): group["weight_decay"]
        for group in build_optimizer(layer, OptimizerConfig(weight_decay=0.1)).param_groups
        for p in group["params"]
    }
    assert (decays[id(layer.weight)], decays[id(layer.bias)]) == (0.1, 0.0)
