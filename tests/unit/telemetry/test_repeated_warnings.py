"""Repeated warnings become few lines with a count."""

from __future__ import annotations

from miles.telemetry.repeated_warnings import RepeatedWarnings


def test_six_hundred_failures_of_one_kind_are_three_lines_with_a_count() -> None:
    repeated = RepeatedWarnings()
    texts = [f"group {n} failed and is retried: sample {n % 4} at host:{n}: no key 'k{n}'" for n in range(600)]
    lines = [line for text in texts if (line := repeated.note(text))]
    assert lines == [texts[0], f"{texts[9]} (10 times by now)", f"{texts[99]} (100 times by now)"]


def test_another_kind_is_said_at_once() -> None:
    repeated = RepeatedWarnings()
    assert repeated.note("group 1 failed: no answer")
    assert not repeated.note("group 2 failed: no answer")
    assert repeated.note("group 3 failed: the label is missing") == "group 3 failed: the label is missing"


def test_warnings_that_are_all_different_are_bounded_too() -> None:
    repeated = RepeatedWarnings()
    letters = "abcdefghij"
    texts = [f"warning {a}{b}{c}" for a in letters for b in letters for c in letters]
    assert sum(bool(repeated.note(text)) for text in texts) < 80
