"""Shares of wall time."""

from __future__ import annotations

import pytest

from miles.services.controller.status.activity import ActivityClock


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_goes_to_what_was_going_on_and_else_to_idle() -> None:
    time = Time()
    clock = ActivityClock(time)
    clock.begin("generate")
    time.now = 3.0
    clock.end("generate")
    time.now = 4.0
    with clock.during("train"):
        time.now = 9.0
    with clock.during("sync"):
        time.now = 10.0
    shares = clock.shares()
    assert shares == pytest.approx({"generate": 0.3, "reward": 0, "train": 0.5, "sync": 0.1, "idle": 0.1})


def test_overlapping_activities_each_count_in_full() -> None:
    time = Time()
    clock = ActivityClock(time)
    clock.begin("generate")
    clock.begin("train")
    time.now = 2.0
    clock.end("train")
    time.now = 4.0
    totals = clock.totals()
    assert (totals["generate"], totals["train"], totals["idle"], totals["wall"]) == (4.0, 2.0, 0.0, 4.0)


def test_time_measured_afterwards_moves_and_never_goes_below_zero() -> None:
    time = Time()
    clock = ActivityClock(time)
    clock.begin("generate")
    time.now = 2.0
    clock.end("generate")
    clock.move("generate", "reward", 0.5)
    clock.move("generate", "reward", 100.0)
    totals = clock.totals()
    assert (totals["generate"], totals["reward"]) == (0.0, 2.0)


def test_a_restart_forgets_the_past_but_not_what_goes_on() -> None:
    time = Time()
    clock = ActivityClock(time)
    clock.begin("generate")
    time.now = 5.0
    clock.restart()
    time.now = 6.0
    assert clock.totals() == {"generate": 1.0, "reward": 0.0, "train": 0.0, "sync": 0.0, "idle": 0.0, "wall": 1.0}
