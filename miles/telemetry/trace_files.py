"""Reads the trace of a step: which processes took part, what each did, and the step's phases."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

from miles.telemetry.tracing import Span

PHASES = "phases.json"


@dataclasses.dataclass(frozen=True, slots=True)
class Trace:
    """What all processes did during one step. Times in nanoseconds since the Unix epoch."""

    step: int
    phases: Mapping[str, tuple[int, int]]
    """Begin and end of the parts of the step, in order: collect, train, publish."""
    processes: Mapping[str, Sequence[Span]]
    """Spans by name of the worker; they may reach beyond the step."""

    @property
    def begin_ns(self) -> int:
        """Begin of the step."""
        return min(begin for begin, _ in self.phases.values())

    @property
    def end_ns(self) -> int:
        """End of the step."""
        return max(end for _, end in self.phases.values())


def traced_steps(run_dir: pathlib.Path) -> list[int]:
    """Return the steps of a run that have a trace, in order."""
    return sorted(int(file.parent.name.removeprefix("step-")) for file in run_dir.glob(f"traces/step-*/{PHASES}"))


def read_trace(run_dir: pathlib.Path, step: int) -> Trace:
    """Read the trace of a step. Raises FileNotFoundError when there is none, ValueError for a damaged file."""
    folder = run_dir / "traces" / f"step-{step}"
    described = _read(folder / PHASES)
    processes = {}
    for file in sorted(folder.glob("*.json")):
        if file.name != PHASES:
            written = _read(file)
            processes[written["process"]] = [Span(*one) for one in written["spans"]]
    return Trace(step, {name: (begin, end) for name, (begin, end) in described["phases"].items()}, processes)


def _read(file: pathlib.Path) -> dict:  # type: ignore[type-arg]
    try:
        return dict(json.loads(file.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not a trace file: {error}") from error
