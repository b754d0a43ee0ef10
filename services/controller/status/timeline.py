"""Writes and reads the timeline of a run: its activities and their times, as JSON lines."""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from typing import IO

from miles.regular_files import open_to_append, open_to_read
from miles.rpc.gen import records_pb2

NAME = "timeline.jsonl"
DEFAULT_LIMIT = 1000
MAX_LIMIT = 10_000
_LINE_BYTES = 256
"""More than any line has."""


class TimelineWriter:
    """Appends spans; a resumed run appends to the same file."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._file: IO[str] | None = None
        self._unix_minus_monotonic = time.time() - time.monotonic()
        self.step = 0
        """The current training step."""

    def add(self, activity: str, start_s: float, end_s: float, worker_id: str = "") -> None:
        """Write one span, of a worker or of the run; times are those of the monotonic clock, in seconds."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_to_append(self._path)
        shift = self._unix_minus_monotonic
        line = {
            "activity": activity,
            "step": self.step,
            "start": round(start_s + shift, 3),
            "end": round(end_s + shift, 3),
            **({"worker": worker_id} if worker_id else {}),
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; a later span opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_timeline(path: pathlib.Path, after_unix_s: float, limit: int) -> list[records_pb2.ActivitySpan]:
    """Return the newest spans that end after a time, oldest first, reading only the file's end."""
    limit = min(limit or DEFAULT_LIMIT, MAX_LIMIT)
    start, lines = 0, [b""]
    with contextlib.suppress(OSError), open_to_read(path) as file:  # nothing, or no file, is there
        size = file.seek(0, 2)
        start = max(0, size - limit * _LINE_BYTES)
        file.seek(start)
        lines = file.read().split(b"\n")
    complete = lines[1 if start else 0 : -1]
    spans = [_span(line) for line in complete[-limit:]]
    return [span for span in spans if span is not None and span.end_unix_s > after_unix_s]


def _span(line: bytes) -> records_pb2.ActivitySpan | None:
    """Return the span of a line; None for one that a power cut has spoiled."""
    try:
        span = json.loads(line)
        return records_pb2.ActivitySpan(
            activity=span["activity"],
            step=span["step"],
            start_unix_s=span["start"],
            end_unix_s=span["end"],
            worker_id=span.get("worker", ""),
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
