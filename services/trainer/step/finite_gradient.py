"""What becomes of a gradient that is not finite: the step is skipped and told, and too many of them end the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

_NAMED = 3


@dataclasses.dataclass(frozen=True, slots=True)
class StepOutcome:
    """What an optimizer step did; the same on every rank."""

    norm: float
    """Of the gradient before clipping."""
    skipped: bool = False
    """Whether nothing has changed, because the norm was not finite."""
    scale_overflowed: bool = False
    """Whether the scale of float16 losses was too large, and is smaller now."""
    broken: Sequence[str] = ()
    """Parameters with elements that are not finite in a skipped step, in the model's order."""


class SkippedSteps:
    """Counts steps of one learner that are skipped in a row; an overflow of float16 is not one of them."""

    def __init__(self, role: str, allowed: int) -> None:
        """`allowed` in a row do not end the run."""
        self._role = role
        self._allowed = allowed
        self._in_a_row = 0

    def note(self, outcome: StepOutcome) -> str | None:
        """Count a step; returns what a person should know of one that was skipped.

        Raises FloatingPointError, with the weights as they were, for one too many.
        """
        if not outcome.skipped:
            self._in_a_row = 0
        if not outcome.skipped or outcome.scale_overflowed:
            return None
        self._in_a_row += 1
        nearest = ", ".join(reversed(outcome.broken[-_NAMED:]))
        where = f"the norm of the {self._role}'s gradient is {outcome.norm}; "
        if outcome.broken:
            where += f"it is broken in {len(outcome.broken)} parameters, of which nearest to the loss: {nearest}"
        else:
            where += "each of its elements is finite, but they are too large for a norm in float32"
        if self._in_a_row <= self._allowed:
            return f"{where}; the step was skipped ({self._in_a_row} of at most {self._allowed} in a row)"
        raise FloatingPointError(
            f"{where}, {self._in_a_row} steps in a row, and max_nonfinite_steps is {self._allowed}; the weights were "
            "left as they were. A lower lr, a smaller clip range, fewer layers in low precision or train_dtype float32 "
            "may help; rewards and log-probabilities of these steps are worth a look"
        )
