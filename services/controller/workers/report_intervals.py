"""How often each of many workers reports: all together at a rate that leaves the controller time for its work."""

from __future__ import annotations

_REPORTS_A_SECOND = 500
"""Of one kind from all workers: a twentieth of a processor."""

_LONGEST_S = 15.0
"""A worker that is silent for a minute counts as lost."""


def report_interval_s(workers: int, shortest_s: float) -> float:
    """Return the time between two reports of one of so many workers, in seconds."""
    return max(shortest_s, min(workers / _REPORTS_A_SECOND, _LONGEST_S))
