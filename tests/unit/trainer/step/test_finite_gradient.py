"""Steps that are skipped because a gradient is not finite, and where too many of them end."""

from __future__ import annotations

import math

import pytest

from miles.services.trainer.step.finite_gradient import SkippedSteps, StepOutcome

TAKEN = StepOutcome(1.0)
OVERFLOW = StepOutcome(math.inf, skipped=True, scale_overflowed=True)
TOO_LARGE = StepOutcome(math.inf, skipped=True)
BROKEN = StepOutcome(math.nan, skipped=True, broken=["embed", "layers.0.up", "layers.0.down", "layers.1.up"])


def test_a_skipped_step_is_told_with_the_parameters_nearest_to_the_loss() -> None:
    words = SkippedSteps("policy", 2).note(BROKEN)
    assert words == (
        "the norm of the policy's gradient is nan; it is broken in 4 parameters, of which nearest to the loss: "
        "layers.1.up, layers.0.down, layers.0.up; the step was skipped (1 of at most 2 in a row)"
    )


def test_one_more_than_allowed_in_a_row_ends_the_run() -> None:
    skipped = SkippedSteps("critic", 2)
    for outcome in (BROKEN, BROKEN, TAKEN, BROKEN, BROKEN):
        skipped.note(outcome)
    with pytest.raises(FloatingPointError, match=r"layers.1.up.*3 steps in a row, and max_nonfinite_steps is 2"):
        skipped.note(BROKEN)


def test_none_allowed_ends_it_at_the_first() -> None:
    with pytest.raises(FloatingPointError, match="critic"):
        SkippedSteps("critic", 0).note(BROKEN)


def test_an_overflow_of_float16_is_no_such_step_and_does_not_end_the_row() -> None:
    skipped = SkippedSteps("policy", 1)
    assert skipped.note(TAKEN) is None
    assert skipped.note(BROKEN) is not None
    assert skipped.note(OVERFLOW) is None
    with pytest.raises(FloatingPointError):
        skipped.note(BROKEN)


def test_a_norm_that_overflows_with_finite_elements_is_counted_and_told() -> None:
    skipped = SkippedSteps("policy", 1)
    assert "too large for a norm in float32" in str(skipped.note(TOO_LARGE))
    with pytest.raises(FloatingPointError, match="2 steps in a row"):
        skipped.note(TOO_LARGE)
