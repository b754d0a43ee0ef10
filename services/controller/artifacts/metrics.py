"""Reads a run's metrics.jsonl as series; later reads take only what was appended since."""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import pathlib
from collections.abc import Iterable, Sequence

from miles.regular_files import open_to_read
from miles.rpc.gen import records_pb2
from miles.telemetry.metrics import MAX_LINE_BYTES, parse_line


@dataclasses.dataclass(slots=True)
class Point:
    """One value of one metric."""

    value: float
    unix_s: float


class MetricLog:
    """The metrics of one run, by name and step. Not safe for several threads at once."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None
        """Device and inode of the file that was read."""
        self._offset = 0
        """How far it was read, in bytes."""
        self._newest_step: int | None = None
        self._series: dict[str, dict[int, Point]] = collections.defaultdict(dict)

    def refresh(self) -> None:
        """Read what was written since the last call; all of it when the file was replaced."""
        try:
            opened = open_to_read(self._path)
        except OSError:  # it is not there yet, or something else is in its place
            self._forget()
            return
        with opened as file:
            state = os.fstat(file.fileno())
            if (state.st_dev, state.st_ino) != self._file or state.st_size < self._offset:
                self._forget()
                self._file = (state.st_dev, state.st_ino)
            file.seek(self._offset)
            while line := file.readline(MAX_LINE_BYTES):
                if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
                    break  # it is being written
                self._offset += len(line)
                if (parsed := parse_line(line)) is not None:
                    self._add(parsed)

    @property
    def names(self) -> list[str]:
        """Every metric name so far, in order."""
        return sorted(self._series)

    def newest(self) -> dict[str, float]:
        """Return the last finite value of every metric."""
        newest = {}
        for name, points in self._series.items():
            finite = [point.value for point in points.values() if math.isfinite(point.value)]
            if finite:
                newest[name] = finite[-1]
        return newest

    def select(self, request: records_pb2.ListMetricsRequest) -> records_pb2.ListMetricsResponse:
        """Return the series that a request asks for."""
        last = request.last_step if request.HasField("last_step") else None
        stride = max(1, request.stride)
        response = records_pb2.ListMetricsResponse(names=self.names)
        if self._newest_step is not None:
            response.newest_step = self._newest_step
        for name in matching(self.names, request.names):
            points = self._series[name]
            steps = [s for s in sorted(points) if s >= request.first_step and (last is None or s <= last)]
            if steps:
                response.series.append(_series(name, [(s, points[s]) for s in steps], request.first_step, stride))
        return response

    def _add(self, line: dict[str, float | None]) -> None:
        step, unix_s = int(line.pop("step") or 0), float(line.pop("unix_s", None) or 0.0)
        self._newest_step = step if self._newest_step is None else max(step, self._newest_step)
        for name, value in line.items():
            self._series[name][step] = Point(math.nan if value is None else float(value), unix_s)

    def _forget(self) -> None:
        self._file = None
        self._offset = 0
        self._newest_step = None
        self._series.clear()


def matching(names: Iterable[str], wanted: Sequence[str]) -> list[str]:
    """Return the names wanted exactly or by a prefix with an asterisk; all when nothing is wanted."""
    exact = {name for name in wanted if not name.endswith("*")}
    prefixes = tuple(name[:-1] for name in wanted if name.endswith("*"))
    return [name for name in names if not wanted or name in exact or (prefixes and name.startswith(prefixes))]


def _series(name: str, points: Sequence[tuple[int, Point]], first: int, stride: int) -> records_pb2.MetricSeries:
    stretches: dict[int, list[Point]] = {}
    for step, point in points:
        stretches.setdefault(step if stride == 1 else first + (step - first) // stride * stride, []).append(point)
    return records_pb2.MetricSeries(
        name=name,
        steps=list(stretches),
        values=[_mean([point.value for point in stretch]) for stretch in stretches.values()],
        unix_s=[max(point.unix_s for point in stretch) for stretch in stretches.values()],
    )


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
