"""What is told of an engine whose server went while new weights were loaded."""

from __future__ import annotations

import pathlib

import pytest
import torch
from torch_engine_models import save_checkpoint, weights_of

from miles.services.rollout.engines.base import EngineFailed
from miles.services.rollout.engines.sglang import SglangEngine, SglangOptions
from miles.services.rollout.serving.readiness import Serving
from miles.weights.base import WeightsRefused


async def test_a_load_that_fails_says_why_although_nothing_is_left_to_pause(tmp_path: pathlib.Path) -> None:
    model = save_checkpoint(tmp_path, "qwen3")
    options = SglangOptions(hf_checkpoint=str(tmp_path), device="cpu", dtype="float32", start_timeout_s=0.05)
    engine = SglangEngine(options)  # no server was ever up
    await engine._loader.prepare()
    serving = Serving(engine, lambda: None)
    with pytest.raises(WeightsRefused, match=r"the weights do not fit the model: .* is missing"):
        await serving.load_weights(1, {"x": torch.zeros(1)})
    assert not serving.paused
    with pytest.raises(EngineFailed, match="for an SGLang server to be up"):
        await serving.load_weights(1, weights_of(model))
    assert serving.version is None
