"""Gradients that are not finite: the step changes nothing, the layer is named, and the run goes on."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from megatron_kit import needs_megatron, run_cases
from megatron_models import write_model
from safetensors.torch import load_file
from trainer_cases import write_dense_model


def case(name: str, model: pathlib.Path, module: str, **flags: Any) -> list[dict[str, Any]]:
    """Three steps of which the second one has a broken gradient, and the first one alone."""
    base = {"model": str(model), "flags": flags}
    return [
        {"name": f"{name}-one", "steps": 1, **base},
        {"name": f"{name}-two", "steps": 2, "break": {"module": module, "steps": [1]}, **base},
        {"name": f"{name}-three", "steps": 3, "break": {"module": module, "steps": [1]}, **base},
    ]


def check(out: pathlib.Path, name: str, named: str, spared: str) -> None:
    results = {key: json.loads((out / f"{name}-{key}.json").read_text()) for key in ("one", "two", "three")}
    one, two, three = (load_file(out / f"{name}-{key}.safetensors") for key in results)
    assert all(two[key].equal(tensor) for key, tensor in one.items()), "the broken step changed something"
    assert not all(three[key].equal(tensor) for key, tensor in one.items())
    assert [metrics["train/skipped_steps"] for metrics in results["three"]["metrics"]] == [0.0, 1.0, 0.0]
    assert "train/grad_norm" not in results["three"]["metrics"][1]
    before, (warning,), after = results["three"]["warnings"]
    assert (before, after) == ([], [])
    assert named in warning
    assert spared not in warning


@pytest.mark.engine
@pytest.mark.parametrize("ranks", [1, 2])
def test_fsdp_skips_the_step_and_names_the_layer(tmp_path: pathlib.Path, ranks: int) -> None:
    model = write_dense_model(tmp_path / "model")
    run_cases(case("fsdp", model, "layers.1.mlp.down_proj"), tmp_path, ranks=ranks, megatron=False)
    check(tmp_path, "fsdp", "model.layers.1.mlp.down_proj.weight", "layers.2")


@pytest.mark.engine
@needs_megatron
def test_megatron_skips_the_step_and_names_the_layer_over_its_stages(tmp_path: pathlib.Path) -> None:
    model = write_model("Llama", tmp_path / "model")
    flags = {"train_backend": "megatron", "pipeline_model_parallel_size": 2}
    run_cases(case("pp", model, "layers.1.mlp.linear_fc2", **flags), tmp_path, ranks=2)
    check(tmp_path, "pp", "decoder.layers.1.mlp.linear_fc2.weight", "layers.2")
