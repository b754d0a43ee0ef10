"""A trace as Chrome trace events, which Perfetto (ui.perfetto.dev) and chrome://tracing draw. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from miles.telemetry.trace_files import Trace
from miles.telemetry.tracing import Span


def trace_events(trace: Trace) -> dict[str, Any]:
    """The JSON object of a trace: a process for each worker and one for the step's phases; times in microseconds."""
    events: list[dict[str, Any]] = []
    phases = [Span(name, begin, end, 0) for name, (begin, end) in trace.phases.items()]
    for pid, (process, spans) in enumerate([(f"step {trace.step}", phases), *trace.processes.items()]):
        events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": process}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}})
        events += [_event(one, pid, lane, trace.begin_ns) for one, lane in zip(spans, lanes(spans), strict=True)]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def lanes(spans: Sequence[Span]) -> list[int]:
    """A line for each span on which it lies inside, before or behind every other: what runs at once gets its own."""
    order = sorted(range(len(spans)), key=lambda i: (spans[i].begin_ns, -spans[i].end_ns))
    stacks: defaultdict[int, list[int]] = defaultdict(list)
    """Ends of the spans that are open on each lane, outermost first."""
    found = [0] * len(spans)
    for i in order:
        lane = 0
        while not _fits(stacks[lane], spans[i]):
            lane += 1
        stacks[lane].append(spans[i].end_ns)
        found[i] = lane
    return found


def _fits(open_ends: list[int], span: Span) -> bool:
    while open_ends and open_ends[-1] <= span.begin_ns:
        open_ends.pop()
    return not open_ends or span.end_ns <= open_ends[-1]


def _event(span: Span, pid: int, lane: int, begin_ns: int) -> dict[str, Any]:
    event = {
        "ph": "X",
        "name": span.name,
        "pid": pid,
        "tid": lane,
        "ts": (span.begin_ns - begin_ns) / 1e3,
        "dur": (span.end_ns - span.begin_ns) / 1e3,
    }
    return event | ({"args": {"detail": span.detail}} if span.detail else {})
