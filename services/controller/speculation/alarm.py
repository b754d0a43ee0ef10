"""Notices drafts of which next to nothing is accepted, and drafts that the policy moves away from. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from miles.services.controller.speculation.advice import DraftSetup, against_drift, against_low_acceptance
from miles.services.controller.speculation.draft_counts import DraftCounts, Versions, length_at

ENOUGH, ENOUGH_AT_OFF = 100, 20
"""Verifications that are judged together, and the same of an engine that turns drafts off; a step with fewer is judged
with those behind it."""
_HYSTERESIS = 1.2
"""An alarm ends when so many times the drafts are accepted that began it."""
_FIRST = 3
"""Judgements whose mean is what later ones are compared with."""
_FALLEN, _RISEN = 0.75, 0.85
"""Shares of the drafts accepted at first at which drift is told, and is over."""
_LEAST_AT_FIRST = 0.1
"""Accepted drafts per verification at first below which there is nothing to lose."""
_SHOWN = 4

StepCounts = Mapping[str, Mapping[Versions, DraftCounts]]
"""What a step counted, by engine and versions."""


class AcceptanceAlarm:
    """Gets what each step counted; says once when an alarm begins, and once when it is over."""

    def __init__(self, setup: DraftSetup, alarm_at: float) -> None:
        """`alarm_at`: mean tokens per verification at or below which a draft is called wrong."""
        self._setup = setup
        self._alarm_at = alarm_at
        self._pending: dict[str, DraftCounts] = {}
        self._off: set[str] = set()
        """Engines that drafted nothing at the end of the step before."""
        self._low: set[str] = set()
        """Engines that people were told of."""
        self._drift = DriftAlarm(setup)

    def note(self, step: int, counts: StepCounts, off: Collection[str] = ()) -> tuple[list[str], list[str]]:
        """Take in a step; return warnings, and what people may want to know besides.

        `off`: engines that draft nothing now. What they count while they do not says nothing of the draft; what they
        counted before is judged.
        """
        low: dict[str, str] = {}
        over: list[str] = []
        were_off, self._off = self._off, set(off)
        for engine, by_versions in sorted(counts.items()):
            if engine in were_off:
                self._pending.pop(engine, None)
                continue
            pending = self._pending.get(engine, DraftCounts()) + total(by_versions.values())
            judged = pending.verify_count >= (ENOUGH_AT_OFF if engine in off else ENOUGH)
            self._pending[engine] = DraftCounts() if judged else pending
            if not judged or (length := pending.accept_length) is None:
                continue
            if length <= self._alarm_at and engine not in self._low:
                self._low.add(engine)
                low[engine] = f"{engine} {length:.2f} ({next(reversed(list(by_versions)), '')})"
            elif engine in self._low and length > 1 + (self._alarm_at - 1) * _HYSTERESIS:
                self._low.discard(engine)
                over.append(f"{engine} accepts drafts again: {length:.2f} tokens per verification at step {step}")
        warnings = [self._low_text(step, list(low.values()))] if low else []
        drafting = [by_versions for engine, by_versions in counts.items() if engine not in were_off | self._off]
        drift, still = self._drift.note(step, [each for by_versions in drafting for each in by_versions.items()])
        return warnings + drift, over + still

    def _low_text(self, step: int, engines: list[str]) -> str:
        more = f" and {len(engines) - _SHOWN} engines more" if len(engines) > _SHOWN else ""
        return (
            f"next to nothing of the drafts is accepted at step {step}; tokens per verification: "
            f"{', '.join(engines[:_SHOWN])}{more}, at or below draft_acceptance_alarm = {self._alarm_at:g}. "
            f"{against_low_acceptance(self._setup)}"
        )


class DriftAlarm:
    """Compares what is accepted with what was accepted at first, of as many drafts, over all engines."""

    def __init__(self, setup: DraftSetup) -> None:
        self._setup = setup
        self._pending = DraftCounts()
        self._first = DraftCounts()
        self._judgements = 0
        self._drifted = False

    def note(self, step: int, counts: list[tuple[Versions, DraftCounts]]) -> tuple[list[str], list[str]]:
        """Take in a step; return warnings, and what people may want to know besides."""
        self._pending += total(count for _, count in counts)
        if not self._setup.has_model or self._pending.verify_count < ENOUGH:
            return [], []
        now, self._pending = self._pending, DraftCounts()
        self._judgements += 1
        if self._judgements <= _FIRST:
            self._first += now
            return [], []
        first = self._first.accept_length or 1.0
        if first - 1 < _LEAST_AT_FIRST:
            return [], []
        length = length_at(now, self._first.drafts_per_verification)
        share = (length - 1) / (first - 1)
        fell = f"{first:.2f} tokens per verification in the first steps, {length:.2f} at step {step}"
        if share <= _FALLEN and not self._drifted:
            self._drifted = True
            versions = max((each for each, _ in counts), key=lambda each: each.policy)
            drafts = self._first.drafts_per_verification
            return [
                f"less of the drafts is accepted than before: {fell} ({versions}), of {drafts:.1f} drafts each. "
                f"{against_drift(self._setup)}"
            ], []
        if share >= _RISEN and self._drifted:
            self._drifted = False
            return [], [f"drafts are accepted about as before: {fell}"]
        return [], []


def total(counts: Iterable[DraftCounts]) -> DraftCounts:
    """Return the sum of counts."""
    return sum(counts, DraftCounts())
