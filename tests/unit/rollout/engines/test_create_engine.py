from __future__ import annotations

import pathlib
from typing import Any

import pytest

from miles.config import JobConfig
from miles.engine_spec import ENGINE_SPECS
from miles.services.rollout.engines.registry import configured_engine, create_engine

MINIMAL: dict[str, Any] = {
    "prompt_data": "p.jsonl",
    "label_key": "label",
    "num_rollout": 1,
    "rollout_batch_size": 8,
    "n_samples_per_prompt": 2,
    "lr": 1e-6,
    "rollout_max_response_len": 16,
    "rollout_dtype": "float32",
    "rm_type": "math",
}


@pytest.mark.parametrize("name", ENGINE_SPECS)
def test_an_engine_is_built_as_the_job_says_and_refers_to_its_description(name: str, tmp_path: pathlib.Path) -> None:
    config = JobConfig.from_flat({**MINIMAL, "hf_checkpoint": str(tmp_path), "rollout_backend": name})
    engine = configured_engine(config, device="cpu", name="rollout-0")
    assert engine.spec is ENGINE_SPECS[config.rollout.rollout_backend]
    assert engine.version is None
    assert engine.draft is None


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown rollout backend 'vllm'"):
        create_engine("vllm")
