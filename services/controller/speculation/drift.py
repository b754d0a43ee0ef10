"""Notices that less of the drafts is accepted than before. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from miles.services.controller.speculation.advice import DraftSetup, against_drift
from miles.services.controller.speculation.draft_counts import DraftCounts, Versions, length_at, total

ENOUGH = 100
"""Verifications that are judged together; a step with fewer is judged with those behind it."""
_COMPARED = 3
"""Judgements whose mean is what later ones are compared with."""
_FALLEN, _RISEN = 0.75, 0.85
"""Shares of the drafts accepted before at which drift is told, and is over."""
_LEAST = 0.1
"""Accepted drafts per verification before, below which there is nothing to lose."""


class DriftAlarm:
    """Compares what is accepted, over all engines, with what was accepted before of as many drafts.

    That is at first or, of a draft that is trained and so gets better to begin with, at best.
    """

    def __init__(self, setup: DraftSetup) -> None:
        self._setup = setup
        self._pending = DraftCounts()
        self._recent: deque[DraftCounts] = deque(maxlen=_COMPARED)
        self._before: DraftCounts | None = None
        """What is compared with; None until there is enough."""
        self._drifted = False

    def note(self, step: int, counts: Sequence[tuple[Versions, DraftCounts]]) -> tuple[list[str], list[str]]:
        """Take in a step; return warnings, and what people may want to know besides."""
        self._pending += total(count for _, count in counts)
        if not self._setup.has_model or self._pending.verify_count < ENOUGH:
            return [], []
        now, self._pending = self._pending, DraftCounts()
        before = self._before
        self._recent.append(now)
        if len(self._recent) == _COMPARED:
            self._raise_mark(total(self._recent))
        if before is None or (best := before.accept_length) is None or best - 1 < _LEAST:
            return [], []
        length = length_at(now, before.drafts_per_verification)
        share = (length - 1) / (best - 1)
        when = "at best" if self._setup.trained else "in the first steps"
        fell = f"{best:.2f} tokens per verification {when}, {length:.2f} at step {step}"
        if share <= _FALLEN and not self._drifted:
            self._drifted = True
            versions = max((each for each, _ in counts), key=lambda each: each.policy)
            drafts = f"of {before.drafts_per_verification:.1f} drafts each"
            warning = f"less of the drafts is accepted than before: {fell} ({versions}), {drafts}"
            return [f"{warning}. {against_drift(self._setup)}"], []
        if share >= _RISEN and self._drifted:
            self._drifted = False
            return [], [f"drafts are accepted about as before: {fell}"]
        return [], []

    def _raise_mark(self, recent: DraftCounts) -> None:
        """Compare with the newest judgements from now on, if they are the first or, of a trained draft, the best."""
        mark = self._before
        if mark is None or (
            self._setup.trained and length_at(recent, mark.drafts_per_verification) > (mark.accept_length or 1.0)
        ):
            self._before = recent
