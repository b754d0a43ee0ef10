from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.reward_sdk import RewardFunction, Scored
from miles.reward_sdk.outcome import error_score, group_scores, raised, sample_score


class Unprintable:
    """Raises whatever it is asked."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")


class UnprintableError(Exception):
    """Raises when its message is asked for."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


FUNCTION = RewardFunction("mine", lambda sample: 0.0)


@pytest.mark.parametrize(
    ("value", "number"),
    [(1, 1.0), (0.25, 0.25), (True, 1.0), (np.float32(0.5), 0.5), (np.int64(-3), -3.0), (np.bool_(False), 0.0)],
)
def test_every_real_number_is_a_reward(value: Any, number: float) -> None:
    assert sample_score(FUNCTION, value, "sample 1").reward.value == number


def test_named_numbers_are_a_reward() -> None:
    score = sample_score(FUNCTION, {"format": 1, "answer": 0.5}, "sample 1")
    assert dict(score.reward.named.values) == {"format": 1.0, "answer": 0.5}


def test_metadata_travels_as_json() -> None:
    score = sample_score(FUNCTION, Scored(1.0, {"why": "it is right"}), "sample 1")
    assert score.reward.value == 1.0
    assert score.metadata_json == '{"why":"it is right"}'


@pytest.mark.parametrize(
    "value",
    [
        None,
        "1",
        b"1",
        1j,
        [1.0],
        math.nan,
        math.inf,
        -math.inf,
        {},
        {"a": math.nan},
        {1: 1.0},
        {"a": "1"},
        np.array([1.0]),
        10**400,
        Unprintable(),
        {"a": Unprintable()},
        {"\ud800": 1.0},
        Scored(1.0, {"a": object()}),
        Scored(1.0, {"a": math.nan}),
        Scored(None, {}),  # type: ignore[arg-type]
        Scored(1.0, 3),  # type: ignore[arg-type]
    ],
)
def test_anything_else_becomes_an_error_that_names_function_and_sample(value: Any) -> None:
    score = sample_score(FUNCTION, value, "sample 1 of group 2")
    assert score.WhichOneof("kind") == "error"
    assert "'mine'" in score.error
    assert "sample 1 of group 2" in score.error


@given(st.recursive(st.none() | st.floats() | st.text() | st.integers(), lambda x: st.dictionaries(st.text(), x)))
def test_whatever_is_returned_becomes_a_score(value: Any) -> None:
    assert sample_score(FUNCTION, value, "sample 1").WhichOneof("kind") in ("reward", "error")


@pytest.mark.parametrize("values", [[1.0, 0.0], (1.0, 0.0), np.array([1.0, 0.0]), [1, {"a": 0.0}]])
def test_a_group_function_returns_one_reward_a_sample(values: Any) -> None:
    scores = group_scores(FUNCTION, values, ["a", "b"])
    assert [score.WhichOneof("kind") for score in scores] == ["reward", "reward"]


@pytest.mark.parametrize("values", [None, 1.0, [1.0], [1.0, 2.0, 3.0], "ab", {"a": 1.0, "b": 2.0}, np.float64(1.0)])
def test_any_other_shape_is_an_error_for_each_sample(values: Any) -> None:
    scores = group_scores(FUNCTION, values, ["a", "b"])
    assert [score.WhichOneof("kind") for score in scores] == ["error", "error"]
    assert scores[1].error.endswith("on b")


def test_one_bad_reward_of_a_group_spares_the_others() -> None:
    good, bad = group_scores(FUNCTION, [1.0, math.nan], ["a", "b"])
    assert good.reward.value == 1.0
    assert "nan" in bad.error


def test_an_exception_is_told_with_its_type_text_and_line() -> None:
    try:
        raise KeyError("answer")
    except KeyError as error:
        message = raised("mine", error)
    assert "'mine' raised KeyError: 'answer'" in message
    assert "test_outcome.py:" in message


def test_an_exception_without_a_message_is_told_all_the_same() -> None:
    assert "raised UnprintableError" in raised("mine", UnprintableError())


def test_an_error_with_text_that_is_not_unicode_can_be_sent() -> None:
    assert error_score("bad \ud800").error == "bad \\ud800"
