from __future__ import annotations

from typing import Any

import pytest
from config_cases import MINIMAL

from miles.config import JobConfig
from miles.config.given import given_settings
from miles.config.job import resolved


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lr": 1e-5, "use_kl_loss": True},
        {"global_batch_size": 8, "eval_interval": 1, "eval_prompt_data": ["a", "b"], "eval_temperature": 0.0},
        {"run_dir": "/elsewhere", "rollout_temperature": 0.5, "eps_clip": 0.3, "eps_clip_high": 0.28},
        {"max_weight_staleness": 2, "partial_rollout": True},
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_somebody_gave_is_told_from_what_followed_from_it(changes: dict[str, Any], device: Any) -> None:
    flat = JobConfig.from_flat(resolved({**MINIMAL, **changes, "rollout_batch_size": 16}, device)).to_flat()
    assert given_settings(flat) == {**MINIMAL, **changes, "rollout_batch_size": 16}


def test_a_given_value_that_would_have_followed_anyway_is_not_listed() -> None:
    flat = JobConfig.from_flat(MINIMAL | {"eval_temperature": 1.0, "run_dir": "runs/miles"}).to_flat()
    assert given_settings(flat) == MINIMAL
