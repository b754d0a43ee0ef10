from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from miles.telemetry.trackers.background import BackgroundTracker


class Recorder:
    """A tracker that waits for a gate, and refuses some steps."""

    def __init__(self, gate: threading.Event, refuses: tuple[int, ...] = ()) -> None:
        self.taken: list[int] = []
        self.closed = False
        self._gate, self._refuses = gate, refuses

    def write(self, step: int, unix_s: float, values: Mapping[str, float]) -> None:
        self._gate.wait()
        if step in self._refuses:
            raise OSError("no route")
        self.taken.append(step)

    def close(self) -> None:
        self.closed = True


def opened(recorder: Recorder) -> tuple[BackgroundTracker, list[str]]:
    warnings: list[str] = []
    opening: Callable[[], Recorder] = lambda: recorder  # noqa: E731
    return BackgroundTracker("Board", opening, warnings.append), warnings


def test_the_caller_never_waits_for_a_slow_tracker() -> None:
    gate = threading.Event()
    recorder = Recorder(gate)
    tracker, warnings = opened(recorder)
    for step in range(20):
        tracker.write(step, {"a": 1.0})
    assert recorder.taken == []
    gate.set()
    tracker.close()
    assert (recorder.taken, recorder.closed, warnings) == (list(range(20)), True, [])


def test_a_fault_is_told_once_until_the_tracker_works_again() -> None:
    gate = threading.Event()
    gate.set()
    recorder = Recorder(gate, refuses=(1, 2, 4))
    tracker, warnings = opened(recorder)
    for step in range(6):
        tracker.write(step, {"a": 1.0})
    tracker.close()
    assert recorder.taken == [0, 3, 5]
    assert warnings == ["Board takes no metrics: OSError: no route; metrics.jsonl has all metrics"] * 2


def test_the_end_of_a_run_waits_only_so_long() -> None:
    gate = threading.Event()
    tracker, warnings = opened(Recorder(gate))
    tracker.write(0, {"a": 1.0})
    tracker.close(timeout_s=0.05)
    assert warnings == ["Board has not taken every metric within 0.05 s; metrics.jsonl has them"]
    gate.set()
