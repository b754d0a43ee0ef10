"""Recipes' functions that ask a teacher behind servers mean the settings that do."""

from __future__ import annotations

from typing import Any

import pytest
from config_cases import MINIMAL, faults_for

from miles.config import JobConfig
from miles.config.job import examine
from miles.config.notes import notes

SERVED: dict[str, Any] = {"use_opd": True, "opd_type": "sglang", "rm_url": "http://h:1/generate", "rm_type": None}
NAMES = [f"{package}.rollout.on_policy_distillation.reward_func" for package in ("miles", "slime")]


@pytest.mark.parametrize("name", NAMES)
def test_the_reward_that_asks_the_teacher_is_what_distillation_does_anyway(name: str) -> None:
    config = JobConfig.from_flat({**MINIMAL, **SERVED, "custom_rm_path": name})
    assert config == JobConfig.from_flat({**MINIMAL, **SERVED})
    assert not config.reward.scores({})
    settings = examine({**MINIMAL, **SERVED, "custom_rm_path": name}).settings
    assert "asks the teacher anyway" in str(notes(settings)[0])


def test_it_needs_distillation_from_servers() -> None:
    found = faults_for(custom_rm_path=NAMES[0], rm_type=None)
    assert "but it asks the teacher of on-policy distillation; set use_opd" in found[0]


def test_it_leaves_no_other_reward() -> None:
    found = faults_for(**{**SERVED, "rm_type": "math"}, custom_rm_path=NAMES[1])
    assert f"rm_type = math, but with {NAMES[1]} in custom_rm_path every reward is 0" in found[0]
