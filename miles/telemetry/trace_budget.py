"""A step's time budget: how long each kind of span was under way in each phase of the step. Pure."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from miles.telemetry.trace_files import Trace

Interval = tuple[int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One kind of span of one process. Times in seconds, within the step."""

    process: str
    name: str
    count: int
    longest_s: float
    busy_s: Mapping[str, float]
    """By phase: how long at least one such span was under way."""

    @property
    def total_s(self) -> float:
        """Over all phases."""
        return sum(self.busy_s.values())


def phase_lengths(trace: Trace) -> dict[str, float]:
    """Length of each phase, in seconds."""
    return {name: (end - begin) / 1e9 for name, (begin, end) in trace.phases.items()}


def budget(trace: Trace) -> list[Row]:
    """Rows of the table: process by process, those under way for the longest time first."""
    rows = []
    for process, spans in trace.processes.items():
        by_name: defaultdict[str, list[Interval]] = defaultdict(list)
        for span in spans:
            by_name[span.name].append((span.begin_ns, span.end_ns))
        own = [_row(process, name, intervals, trace) for name, intervals in by_name.items()]
        rows += sorted((row for row in own if row.count), key=lambda row: -row.total_s)
    return rows


def _row(process: str, name: str, intervals: Sequence[Interval], trace: Trace) -> Row:
    within = clipped(intervals, trace.begin_ns, trace.end_ns)
    busy = {phase: covered(clipped(intervals, *bounds)) / 1e9 for phase, bounds in trace.phases.items()}
    return Row(process, name, len(within), max((end - begin for begin, end in within), default=0) / 1e9, busy)


def clipped(intervals: Iterable[Interval], begin: int, end: int) -> list[Interval]:
    """The parts of the intervals that lie between two moments."""
    return [(max(a, begin), min(b, end)) for a, b in intervals if a < end and b > begin]


def covered(intervals: Iterable[Interval]) -> int:
    """Length of the union of intervals."""
    length, reached = 0, None
    for begin, end in sorted(intervals):
        start = begin if reached is None else max(begin, reached)
        if end > start:
            length += end - start
            reached = end
    return length
