"""Keeps what each worker does for a job, and since when."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_GAP_S = 0.05
"""Stretches of scoring that are closer than this count as one."""

Write = Callable[[str, float, float, str], None]
"""(activity, beginning, end, worker): writes a finished stretch; times are those of the monotonic clock."""


@dataclasses.dataclass(frozen=True, slots=True)
class Activity:
    """What a worker does since a time of the monotonic clock; no name while it is idle."""

    name: str
    since_s: float


class WorkerActivities:
    """Notes when workers begin and end an activity."""

    def __init__(self, write: Write, now: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._now = now
        self._current: dict[str, Activity] = {}
        self._noted: dict[str, tuple[str, float, float]] = {}

    def current(self, worker_id: str) -> Activity | None:
        """Return what a worker does; None for one that has done nothing yet."""
        return self._current.get(worker_id)

    def begin(self, worker_id: str, activity: str) -> None:
        """Begin an activity of a worker; its activity before ends."""
        self.end(worker_id)
        self._current[worker_id] = Activity(activity, self._now())

    def end(self, worker_id: str) -> None:
        """End a worker's activity, if it has one; it is idle from now on."""
        now, activity = self._now(), self._current.get(worker_id)
        if activity is None or activity.name:
            self._current[worker_id] = Activity("", now)
            if activity is not None:
                self._write(activity.name, activity.since_s, now, worker_id)

    @contextmanager
    def during(self, worker_id: str, activity: str) -> Iterator[None]:
        """The worker is busy with an activity inside the block."""
        self.begin(worker_id, activity)
        try:
            yield
        finally:
            self.end(worker_id)

    def note(self, worker_id: str, activity: str, seconds: float) -> None:
        """Note an activity that has just ended, after so many seconds; stretches that touch are written as one."""
        end = self._now()
        began = end - seconds
        if noted := self._noted.get(worker_id):
            if noted[0] == activity and began <= noted[2] + _GAP_S:
                began = min(began, noted[1])
            else:
                self._flush(worker_id)
        self._noted[worker_id] = (activity, began, end)
        self._current[worker_id] = Activity("", end)

    def close(self) -> None:
        """Write what has not been written; every worker is idle from now on."""
        for worker_id in list(self._noted):
            self._flush(worker_id)
        for worker_id in list(self._current):
            self.end(worker_id)

    def _flush(self, worker_id: str) -> None:
        activity, began, end = self._noted.pop(worker_id)
        self._write(activity, began, end, worker_id)
