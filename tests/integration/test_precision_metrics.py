"""What metrics tell of low precision, layer by layer, with either trainer and over ranks."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from megatron_kit import needs_megatron, run_cases
from megatron_models import write_model

from miles.precision.recipe import Recipe
from miles.precision.statistics import WeightStatistics, weight_metrics
from miles.services.rollout.engines.checkpoint_weights import read_weights

FLAGS = {"fp8_format": "e4m3", "fp8_recipe": "blockwise", "low_precision_impl": "emulated"}
LAYERS = 4


def case(name: str, model: pathlib.Path, **flags: Any) -> dict[str, Any]:
    """Two rollouts, of which the first one is looked at, with a learning rate of 0."""
    settings = {"lr": 0.0, "precision_metrics_interval": 2, **FLAGS, **flags}
    return {"name": name, "model": str(model), "flags": settings, "steps": 2}


def check(out: pathlib.Path, name: str, model: pathlib.Path) -> None:
    first, second = json.loads((out / f"{name}.json").read_text())["metrics"]
    assert not any(key.startswith("precision/") for key in second)
    expected = WeightStatistics(Recipe(format="fp8_block"), Recipe(format="fp8_block"))
    for key, weight in read_weights(str(model), "float32").items():
        expected.add(key, weight)
    found = {key: first[key] for key in weight_metrics(expected.layers)}
    assert found == {key: pytest.approx(value, rel=1e-5) for key, value in weight_metrics(expected.layers).items()}
    for layer in range(LAYERS):
        assert found[f"precision/train_rollout_weight_diff/layer_{layer:02d}"] == 0
        assert first[f"precision/input_amax/layer_{layer:02d}"] > 0
        assert 0 < first[f"precision/input_error/layer_{layer:02d}"] < 0.1


@pytest.mark.engine
def test_fsdp_tells_each_layers_rounding(tmp_path: pathlib.Path) -> None:
    model = write_model("Qwen3-MoE", tmp_path / "model")
    run_cases([case("fsdp", model)], tmp_path, ranks=2, megatron=False)
    check(tmp_path, "fsdp", model)


@pytest.mark.engine
@pytest.mark.slow
@needs_megatron
def test_megatron_tells_each_layers_rounding_over_stages(tmp_path: pathlib.Path) -> None:
    model = write_model("Qwen3-MoE", tmp_path / "model")
    run_cases([case("pp", model, train_backend="megatron", pipeline_model_parallel_size=2)], tmp_path, ranks=2)
    check(tmp_path, "pp", model)
