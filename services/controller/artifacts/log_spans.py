"""Notes which part of each service's log belongs to a job: services outlive jobs, and their logs have lines of all.

A job's run folder notes in log_spans.json how long each log was whenever the job began to run and ended; one that was
stopped and resumed has several stretches.
"""

from __future__ import annotations

import contextlib
import json
import pathlib

NAME = "log_spans.json"
_OF_NO_JOB = frozenset({"gateway"})
"""Logs of services that never work for one job alone: their lines name whatever job a request was about."""

Span = tuple[int, int]
"""Beginning and end of a stretch, in bytes."""


class LogSpans:
    """The stretches of one job. `log_dir` holds the services' logs."""

    def __init__(self, run_dir: pathlib.Path, log_dir: pathlib.Path) -> None:
        self._path = run_dir / NAME
        self._log_dir = log_dir
        self._own = log_dir.resolve().is_relative_to(run_dir.resolve())

    def begin(self) -> None:
        """Begin a stretch when the job begins to run; after a restart of the controller, continue the last one."""
        stretches = self._read()
        if not stretches or stretches[-1]["end"] is not None:
            self._write([*stretches, {"begin": self._sizes(), "end": None}])

    def end(self) -> None:
        """End the last stretch when the job ends."""
        if stretches := self._read():
            stretches[-1]["end"] = self._sizes()
            self._write(stretches)

    def of(self, name: str, size: int) -> list[Span]:
        """Return the job's stretches of a log that is `size` bytes long; all of it when the logs are the job's own."""
        if self._own:
            return [(0, size)]
        if name in _OF_NO_JOB:
            return []
        spans = []
        for stretch in self._read():
            begin = min((stretch["begin"] or {}).get(name, 0), size)
            end = size if stretch["end"] is None else min(stretch["end"].get(name, 0), size)
            if end > begin:
                spans.append((begin, end))
        return spans

    def _sizes(self) -> dict[str, int]:
        return {path.stem: path.stat().st_size for path in self._log_dir.glob("*.log")}

    def _read(self) -> list[dict[str, dict[str, int] | None]]:
        stretches: list[dict[str, dict[str, int] | None]] = []
        with contextlib.suppress(FileNotFoundError):
            stretches = json.loads(self._path.read_text())
        return stretches

    def _write(self, stretches: list[dict[str, dict[str, int] | None]]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".tmp")
        partial.write_text(json.dumps(stretches) + "\n")
        partial.replace(self._path)
