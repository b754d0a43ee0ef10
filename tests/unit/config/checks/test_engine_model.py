"""Models whose tensors an engine cannot take are refused before the start."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from config_cases import MINIMAL

from miles.config.checks.engine_model import engine_faults
from miles.config.job import examine

MODEL = {
    "model_type": "qwen3_moe", "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48,
    "moe_intermediate_size": 24, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


def faults(folder: pathlib.Path, backend: str, **changes: Any) -> list[str]:
    (folder / "config.json").write_text(json.dumps({**MODEL, **changes}))
    flat = {**MINIMAL, "rollout_backend": backend, "hf_checkpoint": str(folder)}
    return [str(fault) for fault in engine_faults(examine(flat).settings)]


@pytest.mark.parametrize(
    ("changes", "first", "count"),
    [({"mlp_only_layers": [2]}, 2, 1), ({"decoder_sparse_step": 2}, 0, 2)],
)
def test_dense_layers_that_sglang_would_give_experts_are_named_with_both_shapes(
    tmp_path: pathlib.Path, changes: dict[str, Any], first: int, count: int
) -> None:
    (fault,) = faults(tmp_path, "sglang", **changes)
    layer = f"model.layers.{first}.mlp"
    assert (
        f"make {count} layers dense, such as {layer}.gate_proj.weight (48, 32), but sglang gives every layer" in fault
    )
    assert f"{layer}.experts.0.gate_proj.weight (24, 32)" in fault
    assert fault.endswith("set it to torch")
    assert faults(tmp_path, "torch", **changes) == []


def test_models_that_the_engine_builds_as_they_are_have_no_fault(tmp_path: pathlib.Path) -> None:
    assert faults(tmp_path, "sglang") == []
    assert faults(tmp_path, "sglang", model_type="qwen3", mlp_only_layers=[2]) == []
    flat = {**MINIMAL, "rollout_backend": "sglang", "hf_checkpoint": str(tmp_path / "none")}
    assert list(engine_faults(examine(flat).settings)) == []
