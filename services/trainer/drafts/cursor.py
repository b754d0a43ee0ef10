"""Which recording is trained on next, and which were missed: a pure rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(slots=True)
class RecordingCursor:
    """The place in the sequence of training steps, each of which leaves one recording that is removed some time later.

    The oldest that is there comes first: what the policy was like a step ago is as good to learn from as what it is
    like now, and nothing that could be read is left out.
    """

    last: int
    """Training step whose recording was dealt with last; one less than the first that is expected."""
    missed: int = 0
    """Recordings that were gone before they were read, a count."""

    def next(self, steps: Sequence[int]) -> int | None:
        """Choose among the recordings that are there; None when all were dealt with."""
        return min((step for step in steps if step > self.last), default=None)

    def reach(self, step: int) -> range:
        """Go on with a recording; return the steps before it whose recordings were missed."""
        missed = range(self.last + 1, step)
        self.missed += len(missed)
        self.last = step - 1
        return missed

    def done(self, step: int) -> None:
        """A recording was trained on."""
        self.last = step

    def gone(self, step: int) -> None:
        """A recording was removed, or could not be read, before it was trained on."""
        self.last = step
        self.missed += 1

    def begin_at(self, policy_step: int) -> None:
        """The first recording that is expected is that of this step."""
        self.last = policy_step - 1

    def rewind(self, policy_step: int) -> None:
        """The policy has taken so many steps: recordings from there on are made again."""
        self.last = min(self.last, policy_step - 1)
