"""Statistics of rounding against numbers that are known beforehand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from miles.precision.layers import QuantisedLayers, layer_of
from miles.precision.recipe import Recipe
from miles.precision.registry import weight_format
from miles.precision.statistics import (
    InputStatistics,
    WeightStatistics,
    input_metrics,
    merged,
    weight_metrics,
)

FP8 = Recipe(format="fp8_block")
INT4 = Recipe(format="int4", group_size=32)
NAME = "model.layers.3.mlp.up_proj.weight"


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "layer"),
    [(NAME, 3), ("layers.12.", 12), ("model.embed_tokens.weight", None), ("mtp.layers.0.fc.weight", 0)],
)
def test_a_layer_is_known_by_its_name(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


def test_amax_scales_underflow_and_error_of_a_matrix() -> None:
    weight = torch.zeros(128, 256)
    weight[0, 0], weight[0, 1], weight[1, 0] = -448.0, 1e-6, 4.0
    weight[0, 128] = 44.8
    statistics = WeightStatistics(None, FP8)
    statistics.add(NAME, weight)
    metrics = weight_metrics(statistics.layers)
    assert {name: pytest.approx(value, rel=1e-6) for name, value in metrics.items()} == {
        "precision/weight_amax/layer_03": 448.0,
        "precision/weight_scale_min/layer_03": 0.1,
        "precision/weight_scale_max/layer_03": 1.0,
        "precision/weight_underflow/layer_03": 1 / 4,
        "precision/weight_error/layer_03": metrics["precision/weight_error/layer_03"],
        "precision/train_rollout_weight_diff/layer_03": metrics["precision/weight_error/layer_03"],
    }
    assert metrics["precision/weight_error/layer_03"] == pytest.approx(1e-6 / 450.3, rel=1e-2)


@pytest.mark.parametrize("recipe", [FP8, INT4])
def test_trainer_and_engines_with_one_recipe_compute_with_the_same_weights(recipe: Recipe) -> None:
    statistics = WeightStatistics(recipe, recipe)
    statistics.add(NAME, random(96, 64))
    metrics = weight_metrics(statistics.layers)
    assert metrics["precision/train_rollout_weight_diff/layer_03"] == 0
    assert metrics["precision/weight_error/layer_03"] > 0.005


def test_what_only_the_trainer_rounds_is_a_difference() -> None:
    kept = dataclasses.replace(FP8, layers=QuantisedLayers(high_layers=frozenset([3])))
    statistics = WeightStatistics(FP8, kept)
    statistics.add(NAME, random(96, 64))
    metrics = weight_metrics(statistics.layers)
    error = metrics["precision/weight_error/layer_03"]
    assert error > 0.01
    assert metrics["precision/train_rollout_weight_diff/layer_03"] == pytest.approx(error, rel=1e-5)


def test_tensors_outside_of_layers_and_of_both_recipes_are_left_out() -> None:
    statistics = WeightStatistics(INT4, None)
    for name in ("lm_head.weight", "model.layers.0.mlp.gate.weight"):
        statistics.add(name, random(64, 64))
    statistics.add("model.layers.0.input_layernorm.weight", random(64))
    assert statistics.layers == {}


@pytest.mark.parametrize("form", ["fp8_block", "int4", "mxfp8", "nvfp4"])
def test_parts_of_ranks_add_up(form: str) -> None:
    recipe = Recipe(format=form)  # type: ignore[arg-type]
    weights = {f"model.layers.{n % 2}.mlp.{n}.weight": random(128 + 16 * n, 128) for n in range(5)}
    whole, *parts = (WeightStatistics(recipe, None) for _ in range(3))
    for index, (name, weight) in enumerate(weights.items()):
        whole.add(name, weight)
        parts[index % 2].add(name, weight)
    found = weight_metrics(merged(part.layers for part in parts))
    assert found == {name: pytest.approx(value, rel=1e-9) for name, value in weight_metrics(whole.layers).items()}
    scales = found["precision/weight_scale_min/layer_00"], found["precision/weight_scale_max/layer_00"]
    assert 0 < scales[0] < scales[1] <= found["precision/weight_amax/layer_00"]


def test_inputs_have_an_amax_an_underflow_and_an_error() -> None:
    rows = torch.zeros(2, 3, 128)
    rows[0, 0, :3] = torch.tensor([448.0, 1e-6, -3.0])
    rows[1, 2, 0] = 1e-6
    statistics = InputStatistics(weight_format(FP8))
    statistics.add(7, rows)
    statistics.add(7, torch.zeros(0, 128))
    metrics = input_metrics(statistics.layers)
    assert metrics["precision/input_amax/layer_07"] == 448
    assert metrics["precision/input_underflow/layer_07"] == pytest.approx(1 / 4)
    assert metrics["precision/input_error/layer_07"] == pytest.approx(1e-6 / 448, rel=1e-3)
