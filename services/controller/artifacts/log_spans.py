"""Notes which part of each service's log belongs to a job: services outlive jobs, and their logs have lines of all.

A job's run folder notes in log_spans.json how long each log was whenever the job began to run and ended; one that was
stopped and resumed has several stretches.
"""

from __future__ import annotations

import json
import logging
import pathlib
from typing import Any, TypeAlias

from miles.regular_files import open_to_read, replace_file

logger = logging.getLogger(__name__)

NAME = "log_spans.json"
_OF_NO_JOB = frozenset({"gateway"})
"""Logs of services that never work for one job alone: their lines name whatever job a request was about."""
_MAX_BYTES = 16 << 20

Span = tuple[int, int]
"""Beginning and end of a stretch, in bytes."""
Stretch: TypeAlias = dict[str, dict[str, int] | None]
"""Lengths of the logs when a stretch began and ended; None for an end that has not come."""


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
        return {path.stem: path.stat().st_size for path in self._log_dir.glob("*.log") if path.is_file()}

    def _read(self) -> list[Stretch]:
        """Return the stretches; none when the file cannot be read, as after a power cut: the job can do without."""
        try:
            with open_to_read(self._path) as file:
                stretches = json.loads(file.read(_MAX_BYTES))
        except FileNotFoundError:
            return []
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("%s cannot be read (%s): earlier lines of the job's logs are not known", self._path, error)
            return []
        if isinstance(stretches, list) and all(map(_is_stretch, stretches)):
            return stretches
        logger.warning("%s holds something else: earlier lines of the job's logs are not known", self._path)
        return []

    def _write(self, stretches: list[Stretch]) -> None:
        replace_file(self._path, json.dumps(stretches) + "\n")


def _is_stretch(value: Any) -> bool:
    """Return whether this is {"begin": sizes, "end": sizes or null}."""
    if not isinstance(value, dict) or not {"begin", "end"} <= set(value):
        return False
    sizes = [value["begin"], value["end"] or {}]
    return all(isinstance(each, dict) and all(type(size) is int for size in each.values()) for each in sizes)
