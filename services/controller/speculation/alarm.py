"""Notices drafts of which next to nothing is accepted, and with `drift` those that the policy moves away from. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from miles.services.controller.speculation.advice import DraftSetup, against_low_acceptance
from miles.services.controller.speculation.draft_counts import DraftCounts, Versions, total
from miles.services.controller.speculation.drift import ENOUGH, DriftAlarm

ENOUGH_AT_OFF = 20
"""The same of an engine that turns drafts off, which counts no more of them for now."""
GRACE = 10
"""Judgements of an engine before a draft that is trained can be called wrong: it may begin from nothing."""
_HYSTERESIS = 1.2
"""An alarm ends when so many times the drafts are accepted that began it."""
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
        self._judgements: Counter[str] = Counter()
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
            self._judgements[engine] += 1
            if self._setup.trained and self._judgements[engine] <= GRACE:
                continue
            if length <= self._alarm_at and engine not in self._low:
                self._low.add(engine)
                low[engine] = f"{engine} {length:.2f} ({next(reversed(list(by_versions)), '')})"
            elif engine in self._low and length > 1 + (self._alarm_at - 1) * _HYSTERESIS:
                self._low.discard(engine)
                over.append(f"{engine} accepts drafts again: {length:.2f} tokens per verification at step {step}")
        drafting = [by_versions for engine, by_versions in counts.items() if engine not in were_off | self._off]
        drift, still = self._drift.note(step, [each for by_versions in drafting for each in by_versions.items()])
        return [self._low_text(step, list(low.values()))] if low else drift, over + still  # the first says it all

    def _low_text(self, step: int, engines: list[str]) -> str:
        more = f" and {len(engines) - _SHOWN} engines more" if len(engines) > _SHOWN else ""
        return (
            f"next to nothing of the drafts is accepted at step {step}; tokens per verification: "
            f"{', '.join(engines[:_SHOWN])}{more}, at or below draft_acceptance_alarm = {self._alarm_at:g}. "
            f"{against_low_acceptance(self._setup)}"
        )
