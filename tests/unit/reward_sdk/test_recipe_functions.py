from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from miles.extensions.arguments import SETTINGS_VARIABLE, settings_text
from miles.reward_sdk import Scored, Source
from miles.reward_sdk.functions import load
from miles.reward_sdk.recipe_functions import adapted, takes_args
from miles.types import Sample, SampleStatus


def sample(index: int = 0, **fields: Any) -> Sample:
    tokens = np.array([1, 2, 3], np.int32)
    given = {"prompt": "p", "tokens": tokens, "response_length": 2, "response": "r", "status": SampleStatus.COMPLETED}
    return Sample(group_id=4, index=index, **{**given, **fields})


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = {"rollout_temperature": 0.5, "n_samples_per_prompt": 2, "redis_url": "redis://u:p@h", "lr": None}
    monkeypatch.setenv(SETTINGS_VARIABLE, settings_text(flat))


def test_functions_that_need_two_arguments_take_args() -> None:
    def both(args: object, sample: object, **kwargs: object) -> float:
        return 0.0

    def alone(sample: object, key: str = "x", **kwargs: object) -> float:
        return 0.0

    assert takes_args(both)
    assert not takes_args(alone)
    assert not takes_args(lambda *samples: 0.0)


def test_a_recipes_reward_is_called_with_settings_and_the_recipes_sample() -> None:
    [function] = load([Source("generate_functions.reward_func")]).values()
    assert function.is_async
    given = sample(metadata={"turns": 2, "sample_attributes": {"tool_calls": 3}})
    scored = asyncio.run(function.call(given))  # type: ignore[arg-type]
    assert scored == Scored(3.5, {"turns_seen": 2})
    assert given.metadata == {"turns": 2, "sample_attributes": {"tool_calls": 3}}


def test_a_groups_reward_may_have_parts_that_are_no_numbers() -> None:
    [function] = load([Source("generate_functions.group_reward_func", group=True)]).values()
    scored = asyncio.run(function.call([sample(0), sample(1)]))  # type: ignore[arg-type]
    assert scored == [
        Scored({"score": 0.0, "acc": False}, {"reward_details": {"pred": "answer 0"}}),
        Scored({"score": 1.0, "acc": True}, {"reward_details": {"pred": "answer 1"}}),
    ]


def test_a_blocking_function_stays_one_and_sees_a_label_that_is_an_object() -> None:
    [function] = load([Source("generate_functions.blocking_reward")]).values()
    assert not function.is_async
    assert function.call(sample(label=json.dumps({"answer": 7}))) == Scored(7.0, {})  # type: ignore[arg-type]


def test_args_have_every_setting_but_no_secret() -> None:
    seen: list[Any] = []
    adapted(lambda args, sample: seen.append((args, sample)) or 0.0, group=False)(sample(1))
    args, shown = seen[0]
    assert (args.rollout_temperature, args.lr, args.hf_checkpoint, args.ci_test) == (0.5, None, None, False)
    assert (shown.group_index, shown.index, shown.tokens) == (4, 9, [1, 2, 3])
    assert not hasattr(args, "redis_url")
    with pytest.raises(AttributeError, match="args has no search_url: there is no such setting"):
        _ = args.search_url
