"""Writes the metrics of a run as JSON lines, and reads them."""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from miles.regular_files import open_to_append, open_to_read, regular

MAX_LINE_BYTES = 16 << 20
"""Longer than the metrics of a step; a longer line was written by something else."""


class MetricsWriter:
    """Appends one line per step to `metrics.jsonl`: {"step": int, "unix_s": float, name: value, ...}.

    The line of an evaluation has the version that was evaluated as its step: the step that trains that version. A run
    that resumes at `first_step` first deletes the lines of that step and later ones, which it will write again.
    """

    def __init__(
        self,
        path: pathlib.Path,
        first_step: int = 0,
        *,
        keep_evaluation: bool = False,
    ) -> None:
        """`keep_evaluation`: keep the line of the evaluation of version `first_step`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        _delete_from(path, first_step, keep_evaluation)
        self._file = open_to_append(path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of a step; a step may be written in several parts. Not-a-number becomes null."""
        clean = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "unix_s": round(time.time(), 3), **clean}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()


def read_metrics(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a metrics file that can be read: a crash cuts the last one, a power cut spoils others.

    Raises OSError when it is no file.
    """
    if not path.exists():
        return
    with open_to_read(path) as file:
        while line := file.readline(MAX_LINE_BYTES):
            if (parsed := parse_line(line)) is not None:
                yield parsed


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return one line of a metrics file; None for one that no writer of metrics has finished."""
    if not line.endswith(b"\n"):
        return None
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError):
        return None
    numbers = isinstance(parsed, dict) and all(_is_number(value) for value in parsed.values())
    step = parsed.get("step") if numbers else None
    return parsed if type(step) is int and 0 <= step < 2**63 else None


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and abs(value) <= sys.float_info.max)


_EVALUATION = ("eval/", "passrate/")
_NOT_MEASURED = frozenset({"step", "unix_s"})


def _is_evaluation(line: Mapping[str, Any]) -> bool:
    return all(name.startswith(_EVALUATION) for name in line if name not in _NOT_MEASURED)


def _delete_from(path: pathlib.Path, first_step: int, keep_evaluation: bool) -> None:
    lines = list(read_metrics(path))
    if not lines:
        path.unlink(missing_ok=True)
        return
    kept = path.with_suffix(".tmp")
    with open(kept, "w", encoding="utf-8", opener=regular) as file:
        for line in lines:
            kept_evaluation = keep_evaluation and line["step"] == first_step and _is_evaluation(line)
            if line["step"] < first_step or kept_evaluation:
                file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
    kept.replace(path)
