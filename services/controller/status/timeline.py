"""Writes and reads the timeline of a run: its activities and their times, as JSON lines."""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from typing import IO

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
            self._file = self._path.open("a", encoding="utf-8")
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
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        size = file.seek(0, 2)
        start = max(0, size - limit * _LINE_BYTES)
        file.seek(start)
        lines = file.read().split(b"\n")
    complete = lines[1 if start else 0 : -1]
    spans = [json.loads(line) for line in complete[-limit:]]
    return [
        records_pb2.ActivitySpan(
            activity=span["activity"],
            step=span["step"],
            start_unix_s=span["start"],
            end_unix_s=span["end"],
            worker_id=span.get("worker", ""),
        )
        for span in spans
        if span["end"] > after_unix_s
    ]
