"""How long a controller keeps rollout and trainer idle between the phases of a step, as the stand-ins see it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

GAPS: Mapping[str, tuple[str, str]] = {
    "last group → Train": ("finished", "train"),
    "Train → Export": ("trained", "export"),
    "Export → Activate": ("exported", "activate"),
    "active → last lease": ("active", "leased"),
}
"""Each gap, from the last of one kind of moment to the last of another."""


class Moments:
    """Notes when stand-ins get requests and send answers, in seconds of the monotonic clock."""

    def __init__(self) -> None:
        self._noted: list[tuple[str, float]] = []

    def note(self, kind: str) -> None:
        """Something has happened just now."""
        self._noted.append((kind, time.monotonic()))

    def gaps_s(self) -> list[Sequence[float]]:
        """Return the gaps of each whole step, in the order of GAPS."""
        steps: list[Sequence[float]] = []
        last: dict[str, float] = {}
        for kind, at_s in self._noted:
            if kind == "finished" and "leased" in last and "active" in last:  # the next step has begun to end
                steps.append(
                    [last[end] - last[begin] for begin, end in GAPS.values()] if len(last) == len(KINDS) else []
                )
                last = {}
            last[kind] = at_s
        return [step for step in steps if step]


KINDS = frozenset(kind for pair in GAPS.values() for kind in pair)
