"""Runs a tracker in a thread of its own."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping

from miles.telemetry.trackers.base import Tracker

CLOSING_S = 60.0
"""How long the end of a run waits for a tracker to send what is left, in seconds."""
_MAX_WAITING = 10_000
"""Parts of steps that wait for a tracker that cannot be opened or is slow."""
_AGAIN_S = 60.0
"""After how long a tracker that could not be opened is tried again, in seconds."""

Point = tuple[int, float, Mapping[str, float]]


class BackgroundTracker:
    """Hands metrics to a tracker in their order. Faults of the tracker are warnings, each told when it begins."""

    def __init__(self, name: str, open_tracker: Callable[[], Tracker], warn: Callable[[str], None]) -> None:
        """`open_tracker` and `warn` are called in the tracker's thread."""
        self._name = name
        self._open = open_tracker
        self._warn = warn
        self._points: queue.Queue[Point | None] = queue.Queue(_MAX_WAITING)
        self._closing = threading.Event()
        self._lost = 0
        self._trouble = ""
        """The fault that was told last; empty once the tracker works again."""
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take metrics of a step; returns at once."""
        try:
            self._points.put_nowait((step, time.time(), dict(values)))
        except queue.Full:
            if not self._lost:
                self._warn(f"{self._name} is too slow: metrics of step {step} and later ones go to metrics.jsonl alone")
            self._lost += 1

    def close(self, timeout_s: float = CLOSING_S) -> None:
        """Wait until everything is sent, as long as `timeout_s`."""
        self._closing.set()
        end = time.monotonic() + timeout_s
        try:
            self._points.put(None, timeout=timeout_s)
            self._thread.join(max(0.0, end - time.monotonic()))
        except queue.Full:
            pass
        if self._thread.is_alive():
            self._warn(f"{self._name} has not taken every metric within {timeout_s:g} s; metrics.jsonl has them")
        if self._lost:
            self._warn(f"{self._name} was too slow for the metrics of {self._lost} steps; metrics.jsonl has them")

    def _run(self) -> None:
        tracker = self._opened()
        if tracker is None:
            return
        while (point := self._points.get()) is not None:
            self._guarded("takes no metrics", lambda point=point: tracker.write(*point))  # type: ignore[misc]
        self._guarded("could not be closed", tracker.close)

    def _opened(self) -> Tracker | None:
        """Return the tracker, tried until it opens or the run ends."""
        found: list[Tracker] = []
        while not self._guarded("cannot be opened", lambda: found.append(self._open())):
            if self._closing.wait(_AGAIN_S):
                return None
        return found[0]

    def _guarded(self, what: str, call: Callable[[], object]) -> bool:
        try:
            call()
        except Exception as error:  # whatever a package raises, the run goes on
            trouble = f"{self._name} {what}: {type(error).__name__}: {error}"
            if trouble != self._trouble:
                self._warn(f"{trouble}; metrics.jsonl has all metrics")
            self._trouble = trouble
            return False
        self._trouble = ""
        return True
