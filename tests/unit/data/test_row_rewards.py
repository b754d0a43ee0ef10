"""Rows that no reward can score are refused with file and line, in training and evaluation sets alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from config_cases import MINIMAL

from miles.config import JobConfig
from miles.config.sections.reward import RewardConfig
from miles.data import DataError, eval_sources, train_source
from miles.data.prompt_fields import PromptRow
from miles.data.row_rewards import check_reward

BUILT_IN = RewardConfig(rm_type="last_number")
OUTSIDE = RewardConfig(reward_service=("mine=h:1",))
DEFAULT = RewardConfig(reward_service=("default=h:1",))
BOTH = RewardConfig(rm_type="math", reward_service=("mine=h:1",))
TWO = RewardConfig(reward_service=("mine=h:1", "yours=h:2"))
CUSTOM = RewardConfig(custom_rm_path="rewards.score")


def row(label: str | None, **metadata: Any) -> PromptRow:
    return PromptRow("q", label, metadata, None)


@pytest.mark.parametrize(
    ("config", "label", "metadata", "problem"),
    [
        (BUILT_IN, "3 or 4", {}, "the label '3 or 4' is not one number"),
        (BUILT_IN, None, {}, "there is no label, with which the reward last_number compares"),
        (BUILT_IN, "$$", {"rm_type": "math"}, "holds no answer"),
        (BUILT_IN, "3", {"rm_type": "maths"}, "rm_type 'maths', which is no built-in reward; there are exact_match"),
        (BUILT_IN, "3", {"rm_type": 3}, "rm_type 3, which is no built-in reward"),
        (BUILT_IN, "3", {"reward_service": "mine"}, "add --reward-service mine=HOST:PORT"),
        (BOTH, None, {}, "there is no label"),
        (
            TWO,
            "3",
            {},
            "no reward scores it: its metadata names no reward_service, and none of mine, yours is the default",
        ),
        (CUSTOM, "3", {"reward_service": "mine"}, "the reward_service 'mine', which is none of default"),
    ],
)
def test_a_row_that_no_reward_can_score_is_refused(
    config: RewardConfig, label: str | None, metadata: dict[str, Any], problem: str
) -> None:
    with pytest.raises(DataError) as caught:
        check_reward(row(label, **metadata), config)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("config", "label", "metadata"),
    [
        (BUILT_IN, "3", {}),
        (BUILT_IN, "three", {"rm_type": "exact_match"}),
        (OUTSIDE, None, {}),
        (OUTSIDE, None, {"reward_service": "mine", "rm_type": "of its own"}),
        (DEFAULT, None, {}),
        (BOTH, None, {"reward_service": "mine"}),
        (CUSTOM, None, {"rm_type": "anything"}),
    ],
)
def test_a_row_that_a_reward_may_score_is_taken(
    config: RewardConfig, label: str | None, metadata: dict[str, Any]
) -> None:
    check_reward(row(label, **metadata), config)


def test_training_and_evaluation_sets_name_the_lines_of_unreadable_labels(
    checkpoint: str, write_jsonl: Callable[..., str]
) -> None:
    bad = write_jsonl({"input": "q", "label": 3}, {"input": "q", "label": "none"}, {"input": "q", "label": None})
    changes = {"prompt_data": bad, "label_key": "label", "eval_interval": 1, "eval_prompt_data": ["a", bad]}
    config = JobConfig.from_flat(MINIMAL | changes | {"hf_checkpoint": checkpoint, "rm_type": "last_number"})
    for read in (train_source, eval_sources):
        with pytest.raises(DataError) as caught:
            read(config)
        second, third = str(caught.value).splitlines()
        assert "line 2: the label 'none' is not one number" in second
        assert "line 3: there is no label" in third
