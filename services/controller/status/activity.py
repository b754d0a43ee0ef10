"""Measures what share of a run's wall time each activity takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ACTIVITIES = ("generate", "reward", "train", "sync")


class ActivityClock:
    """Adds up the time of each activity; `idle` is the time without any.

    Activities may overlap (an asynchronous run generates while it trains), so shares may add up to more than 1.
    """

    def __init__(
        self, now: Callable[[], float] = time.monotonic, on_span: Callable[[str, float, float], None] | None = None
    ) -> None:
        """`on_span` is called with each activity that has ended, and its beginning and end on the clock of `now`."""
        self._now = now
        self._on_span = on_span
        self._started: dict[str, float] = {}
        self._since = self._began = now()
        self._depth = dict.fromkeys(ACTIVITIES, 0)
        self._total_s = {**dict.fromkeys(ACTIVITIES, 0.0), "idle": 0.0}

    def restart(self) -> None:
        """Reset all totals; activities under way continue."""
        self._since = self._began = self._now()
        self._total_s = dict.fromkeys(self._total_s, 0.0)

    def begin(self, activity: str) -> None:
        """Begin an activity; the same one may overlap itself."""
        self._add_elapsed()
        if self._depth[activity] == 0:
            self._started[activity] = self._since
        self._depth[activity] += 1

    def end(self, activity: str) -> None:
        """End an activity that was begun."""
        self._add_elapsed()
        self._depth[activity] -= 1
        if self._depth[activity] == 0 and self._on_span is not None:
            self._on_span(activity, self._started[activity], self._since)

    @contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """The activity is under way inside the block."""
        self.begin(activity)
        try:
            yield
        finally:
            self.end(activity)

    def move(self, source: str, target: str, seconds: float) -> None:
        """Count `seconds` of one activity as another that was measured afterwards, e.g. waiting for rewards."""
        seconds = min(seconds, self._total_s[source])
        self._total_s[source] -= seconds
        self._total_s[target] += seconds

    def totals(self) -> dict[str, float]:
        """Return seconds per activity, `idle` and `wall` so far."""
        self._add_elapsed()
        return {**self._total_s, "wall": self._since - self._began}

    def shares(self) -> dict[str, float]:
        """Return each activity's share, and idle's, of the wall time."""
        totals = self.totals()
        wall = totals.pop("wall") or 1.0
        return {name: seconds / wall for name, seconds in totals.items()}

    def _add_elapsed(self) -> None:
        now = self._now()
        elapsed, self._since = now - self._since, now
        under_way = [name for name in ACTIVITIES if self._depth[name] > 0]
        for name in under_way or ["idle"]:
            self._total_s[name] += elapsed
