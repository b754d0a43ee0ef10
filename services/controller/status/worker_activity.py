"""What each worker does for a job, and since when."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_GAP_S = 0.05
"""Stretches of scoring that are closer than this count as one."""

Write = Callable[[str, float, float, str], None]
"""(activity, beginning, end, worker): takes a stretch that is over; times are those of the monotonic clock."""


@dataclasses.dataclass(frozen=True, slots=True)
class Doing:
    """A worker at something, or idle (no activity), since a time of the monotonic clock."""

    activity: str
    since_s: float


class WorkerActivity:
    """Notes when workers begin and end something. A worker that does nothing is idle since it last did."""

    def __init__(self, write: Write, now: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._now = now
        self._doing: dict[str, Doing] = {}
        self._noted: dict[str, tuple[str, float, float]] = {}

    def doing(self, worker_id: str) -> Doing | None:
        """What a worker does; None for one that has done nothing yet."""
        return self._doing.get(worker_id)

    def begin(self, worker_id: str, activity: str) -> None:
        """The worker begins something; what it did before is over."""
        self.end(worker_id)
        self._doing[worker_id] = Doing(activity, self._now())

    def end(self, worker_id: str) -> None:
        """The worker is idle from now on, if it was not before."""
        now, doing = self._now(), self._doing.get(worker_id)
        if doing is None or doing.activity:
            self._doing[worker_id] = Doing("", now)
            if doing is not None:
                self._write(doing.activity, doing.since_s, now, worker_id)

    @contextmanager
    def during(self, worker_id: str, activity: str) -> Iterator[None]:
        """The worker does something inside the block."""
        self.begin(worker_id, activity)
        try:
            yield
        finally:
            self.end(worker_id)

    def note(self, worker_id: str, activity: str, seconds: float) -> None:
        """The worker has done something for so long until now; stretches that touch are written as one."""
        end = self._now()
        began = end - seconds
        if noted := self._noted.get(worker_id):
            if noted[0] == activity and began <= noted[2] + _GAP_S:
                began = min(began, noted[1])
            else:
                self._flush(worker_id)
        self._noted[worker_id] = (activity, began, end)
        self._doing[worker_id] = Doing("", end)

    def close(self) -> None:
        """Write what has not been written; every worker is idle."""
        for worker_id in list(self._noted):
            self._flush(worker_id)
        for worker_id in list(self._doing):
            self.end(worker_id)

    def _flush(self, worker_id: str) -> None:
        activity, began, end = self._noted.pop(worker_id)
        self._write(activity, began, end, worker_id)
