"""How many samples of a request a fast function gets at once."""

from __future__ import annotations

import pytest

from miles.reward_sdk.pace import Pace


def sizes(pace: Pace, samples: int) -> list[int]:
    covered = [i for share in pace.shares(samples) for i in range(samples)[share]]
    assert covered == list(range(samples))
    return [share.stop - share.start for share in pace.shares(samples)]


def test_samples_of_an_unknown_function_are_handed_over_one_by_one() -> None:
    assert sizes(Pace(), 8) == [1] * 8


def test_samples_of_a_function_that_was_fast_for_long_share_a_call() -> None:
    pace = Pace()
    for _ in range(8):
        pace.note(1e-4, 1)
    assert sizes(pace, 8) == [1] * 8
    for _ in range(200):
        pace.note(1e-4, 1)
    assert sizes(pace, 8) == [8]
    assert sizes(pace, 0) == []


def test_samples_that_take_a_millisecond_share_a_call_in_small_even_parts() -> None:
    pace = Pace()
    for _ in range(1000):
        pace.note(0.6e-3, 1)
    assert sizes(pace, 8) == [2, 3, 3]


def test_a_call_of_many_samples_counts_as_much_as_their_calls_one_by_one() -> None:
    together, alone = Pace(), Pace()
    together.note(8e-4, 8)
    for _ in range(8):
        alone.note(1e-4, 1)
    assert together.mean_s == pytest.approx(alone.mean_s)


def test_a_call_in_which_no_sample_was_scored_says_nothing() -> None:
    pace = Pace()
    pace.note(0.0, 0)
    assert pace.mean_s == Pace().mean_s


def test_a_function_that_takes_no_time_gets_a_limited_number_of_samples_at_once() -> None:
    pace = Pace()
    for _ in range(100):
        pace.note(0.0, 1000)
    assert sizes(pace, 2048) == [1024, 1024]


def test_a_function_that_is_slow_at_times_gets_its_samples_one_by_one() -> None:
    pace = Pace()
    for i in range(1000):
        pace.note(0.5 if i % 50 == 0 else 1e-4, 1)
        assert sizes(pace, 8) == [1] * 8
