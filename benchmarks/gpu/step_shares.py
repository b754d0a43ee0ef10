"""How the time of a run's steps was shared out, from the spans of its timeline.

`generate`: while any group was leased to a rollout, waiting for an engine's slot and for rewards included. `train`:
from the order for a step until its answer, reading its samples included. `sync`: while the trainer exported a version
or engines activated one. `idle`: while none of these was under way. Neither generating nor training is what is in no
span of the first two: in a synchronous run the new weights and the time between orders.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.gpu.grpo_run import steps_of

ACTIVITIES = ("generate", "train", "sync")
IDLE = "idle"
NEITHER = "neither generating nor training"

Span = tuple[float, float]
"""Beginning and end, in seconds of unix time."""


def spans_of_steps(steps: Sequence[Mapping[str, float]]) -> list[Span]:
    """When steps began and ended, of lines of metrics."""
    return [(step["unix_s"] - step["perf/step_time"], step["unix_s"]) for step in steps]


def shares_of(folder: pathlib.Path, *, skip: int) -> dict[str, float]:
    """Share of the time from the step after `skip` steps to the last one's end; nothing without such a step."""
    steps = spans_of_steps(steps_of(folder)[skip:])
    timeline = folder / "timeline.jsonl"
    if not steps or not timeline.exists():
        return {}
    lines = [json.loads(line) for line in timeline.read_text().splitlines()]
    found: dict[str, list[Span]] = {
        name: [(line["start"], line["end"]) for line in lines if line["activity"] == name and "worker" not in line]
        for name in ACTIVITIES
    }
    inside = (steps[0][0], steps[-1][1])
    wall = inside[1] - inside[0]
    shares = {name: covered(spans, inside) / wall for name, spans in found.items()}
    shares[IDLE] = 1 - covered((span for spans in found.values() for span in spans), inside) / wall
    shares[NEITHER] = 1 - covered([*found["generate"], *found["train"]], inside) / wall
    return shares


def covered(spans: Iterable[Span], inside: Span) -> float:
    """How much of a span others cover, in seconds."""
    total, reached = 0.0, inside[0]
    for start, end in sorted(spans):
        start, end = max(start, reached), min(end, inside[1])
        if end > start:
            total, reached = total + end - start, end
    return total


def shares_text(shares: Mapping[str, float]) -> str:
    """The shares in one line."""
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
