"""Every prompt has a reward service, or the job says which have none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from config_cases import MINIMAL

from miles.config import JobConfig
from miles.config.sections.reward import RewardConfig
from miles.data import DataError, PromptSource
from miles.data.prompts import PromptRecord, PromptSet
from miles.services.controller.jobs.reward_services import check_reward_services


def config(**changes: Any) -> JobConfig:
    return JobConfig.from_flat(MINIMAL | changes)


def prompts(*services: str | None) -> PromptSource:
    tokens = np.array([1, 2], np.int32)
    records = [
        PromptRecord("ab", tokens, None, {} if service is None else {"reward_service": service}) for service in services
    ]
    return PromptSource(PromptSet("prompts.jsonl", records, len(records)))


@pytest.mark.parametrize(
    ("settings", "addresses"),
    [
        ({"reward_service": ("mine=h:1",)}, {"default": "h:1", "mine": "h:1"}),
        ({"reward_service": ("mine=h:1",), "rm_type": "math"}, {"mine": "h:1"}),
        ({"reward_service": ("a=h:1", "b=h:2")}, {"a": "h:1", "b": "h:2"}),
        ({"reward_service": ("default=h:1", "b=h:2")}, {"default": "h:1", "b": "h:2"}),
    ],
)
def test_the_only_service_scores_everything(settings: dict[str, Any], addresses: dict[str, str]) -> None:
    assert RewardConfig(**settings).addresses_with_default() == addresses


def test_prompts_that_choose_a_service_of_the_job_are_fine() -> None:
    two = config(rm_type=None, reward_service=["a=h:1", "b=h:2"])
    check_reward_services(two, [prompts("a", "b")])
    one = config(rm_type=None, reward_service=["mine=h:1"])
    check_reward_services(one, [prompts(None, "mine")])
    check_reward_services(config(), [prompts(None)])


@pytest.mark.parametrize(
    ("settings", "services", "said"),
    [
        (
            {"rm_type": None, "reward_service": ["a=h:1", "b=h:2"]},
            ("a", None, "b"),
            "1 of 3 prompts have no reward service: prompt 2 chooses none by its metadata, and the job has a, b",
        ),
        ({"reward_service": ["a=h:1"]}, ("a", "c"), "prompt 2 chooses 'c' by its metadata, and the job has a, default"),
    ],
)
def test_prompts_that_nothing_scores_are_refused_before_the_start(
    settings: dict[str, Any], services: tuple[str | None, ...], said: str
) -> None:
    with pytest.raises(DataError) as refused:
        check_reward_services(config(**settings), [prompts(*services)])
    assert said in str(refused.value)
    assert "--reward-service NAME=HOST:PORT" in str(refused.value)
