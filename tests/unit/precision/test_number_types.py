from __future__ import annotations

import pytest

from miles.precision.number_types import decide, slow_type

FAST, SLOW, GPU = 0.4, 24.0, None


@pytest.mark.parametrize(
    ("train", "rollout", "slowdowns", "expected"),
    [
        ("auto", "auto", {"trainer-0": FAST, "rollout-0": FAST}, ("bfloat16", "bfloat16")),
        ("auto", "auto", {"trainer-0": SLOW, "rollout-0": SLOW}, ("float32", "float32")),
        ("auto", "auto", {"trainer-0": GPU, "rollout-0": GPU}, ("bfloat16", "bfloat16")),
        # One slow worker holds up all others.
        ("auto", "auto", {"trainer-0": GPU, "rollout-0": FAST, "rollout-1": SLOW}, ("float32", "float32")),
        ("auto", "bfloat16", {"trainer-0": SLOW}, ("bfloat16", "bfloat16")),
        ("auto", "float32", {"trainer-0": GPU}, ("float32", "float32")),
        ("float32", "auto", {"trainer-0": GPU}, ("float32", "float32")),
        ("bfloat16", "auto", {"trainer-0": SLOW}, ("bfloat16", "bfloat16")),
        ("float16", "auto", {"trainer-0": GPU}, ("float16", "bfloat16")),
        ("float16", "auto", {"trainer-0": SLOW}, ("float16", "float32")),
        ("float32", "bfloat16", {"trainer-0": SLOW}, ("float32", "bfloat16")),
    ],
)
def test_types_are_given_or_follow_or_are_fast_everywhere(
    train: str, rollout: str, slowdowns: dict[str, float | None], expected: tuple[str, str]
) -> None:
    chosen = decide(train, rollout, slowdowns)
    assert (chosen.train_dtype, chosen.rollout_dtype) == expected
    assert bool(chosen.reason) == ("auto" in (train, rollout))


def test_the_reason_names_the_slowest_worker_and_its_factor() -> None:
    assert decide("auto", "auto", {"trainer-0": 2.0, "rollout-7": 8.25}).reason == (
        "a bfloat16 matrix product takes 8.25 times as long as a float32 one on rollout-7"
    )


@pytest.mark.parametrize(
    ("slowdown", "before", "expected"),
    [
        (1.2, "bfloat16", "bfloat16"),
        (1.2, None, "float32"),
        (0.8, "float32", "float32"),
        (0.8, None, "bfloat16"),
        (8.0, "bfloat16", "float32"),
        (0.3, "float32", "bfloat16"),
    ],
)
def test_a_run_that_goes_on_changes_its_type_for_a_clear_gain_alone(
    slowdown: float, before: str | None, expected: str
) -> None:
    assert decide("auto", "auto", {"trainer-0": slowdown}, before).train_dtype == expected


def test_a_slow_type_is_warned_of_with_its_factor() -> None:
    warning = slow_type("rollout-0", "bfloat16", 7.4321)
    assert warning is not None
    assert "rollout-0 is slow in bfloat16" in warning
    assert "7.43 times" in warning
    assert slow_type("rollout-0", "bfloat16", 0.5) is None
    assert slow_type("rollout-0", "bfloat16", None) is None
