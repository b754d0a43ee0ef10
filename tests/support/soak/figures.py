"""What the processes of a soak use over time: memory, open files, threads, keys of Redis; into a CSV and a table."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import pathlib
import statistics
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence

import psutil
import redis

from soak.records import Records
from soak.stack import SoakStack

EVERY_S = 5.0
COLUMNS = ("at_s", "process", "pid", "rss_mb", "memory_mb", "files", "threads", "keys")
WATCHED = ("controller", "gateway", "launcher", "redis", "rollout-0", "trainer-0", "weightsync", "reward-0")
_MB = 1e6


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """One process at one time."""

    at_s: float
    process: str
    pid: int
    rss_mb: float
    memory_mb: float
    """Proportional set size; of Redis the memory that it says it uses."""
    files: int
    threads: int
    keys: int = 0
    """Of Redis: how many it has without a time to live."""


class Sampler:
    """Reads all processes every few seconds in a thread of its own. Use as a context manager."""

    def __init__(self, stack: SoakStack, records: Records) -> None:
        self.readings: list[Reading] = []
        self._stack = stack
        self._records = records
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler")

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        with (self._records.folder / "figures.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            while not self._ending.wait(EVERY_S):
                found = self._read()
                self.readings += found
                writer.writerows(dataclasses.astuple(reading) for reading in found)
                file.flush()

    def _read(self) -> list[Reading]:
        found = []
        for name, pid in self._stack.pids().items():
            if name not in WATCHED:
                continue
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, redis.RedisError):
                process = psutil.Process(pid)
                memory = process.memory_full_info()
                used, keys = self._redis() if name == "redis" else (memory.pss, 0)
                numbers = (round(memory.rss / _MB, 2), round(used / _MB, 2), process.num_fds(), process.num_threads())
                found.append(Reading(round(self._records.now_s, 1), name, pid, *numbers, keys))
        return found

    def _redis(self) -> tuple[int, int]:
        with contextlib.closing(redis.Redis.from_url(self._stack.redis.url, socket_timeout=5.0)) as client:
            counts = client.info("keyspace").get("db0", {"keys": 0, "expires": 0})
            return int(client.info("memory")["used_memory"]), counts["keys"] - counts["expires"]


@dataclasses.dataclass(frozen=True, slots=True)
class Trend:
    """How one number of one process went."""

    process: str
    what: str
    lives: int
    start: float
    median: float
    most: float
    second_quarter: float
    """Median of the second quarter of the soak."""
    last_quarter: float
    per_hour: float
    """Slope within the lives of the process, per hour."""


def trends(readings: Iterable[Reading], processes: Sequence[str] = WATCHED) -> list[Trend]:
    """Trends of memory, files and threads of each process, and of the number of Redis' keys."""
    of: dict[str, list[Reading]] = defaultdict(list)
    for reading in readings:
        of[reading.process].append(reading)
    found = []
    for name in processes:
        whats = ("memory_mb", "keys") if name == "redis" else ("memory_mb", "rss_mb", "files", "threads")
        if len(of[name]) >= 8:
            found += [_trend(name, what, of[name]) for what in whats]
    return found


def _trend(name: str, what: str, readings: Sequence[Reading]) -> Trend:
    series = [(reading.at_s, float(getattr(reading, what)), reading.pid) for reading in readings]
    first, last = series[0][0], series[-1][0]
    values = [value for _, value, _ in series]

    def quarter(number: int) -> float:
        begin, end = first + (last - first) * (number - 1) / 4, first + (last - first) * number / 4
        return statistics.median([value for at, value, _ in series if begin <= at <= end] or values)

    return Trend(
        name,
        what,
        len({pid for _, _, pid in series}),
        values[0],
        statistics.median(values),
        max(values),
        quarter(2),
        quarter(4),
        3600 * slope_within(series),
    )


SETTLED_S = 60.0
"""A process is settled so long after its start: what it loads before is no trend."""


def slope_within(series: Sequence[tuple[float, float, int]]) -> float:
    """Least-squares slope per second of (time, value, pid), where each life of a process has a level of its own."""
    lives: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for at, value, pid in series:
        lives[pid].append((at, value))
    top = bottom = 0.0
    for points in lives.values():
        settled = [point for point in points if point[0] >= points[0][0] + SETTLED_S]
        if len(settled) < 3:
            continue
        middle_at = statistics.fmean(at for at, _ in settled)
        middle = statistics.fmean(value for _, value in settled)
        top += sum((at - middle_at) * (value - middle) for at, value in settled)
        bottom += sum((at - middle_at) ** 2 for at, _ in settled)
    return top / bottom if bottom else 0.0


def table(found: Sequence[Trend]) -> str:
    """The trends as a Markdown table."""
    lines = [
        "| process | number | lives | start | median | most | 2nd quarter | last quarter | slope per hour |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for t in found:
        numbers = (t.start, t.median, t.most, t.second_quarter, t.last_quarter, t.per_hour)
        lines.append(f"| {t.process} | {NAMES[t.what]} | {t.lives} | {' | '.join(f'{n:.1f}' for n in numbers)} |")
    return "\n".join(lines)


NAMES = {
    "memory_mb": "memory, MB",
    "rss_mb": "resident, MB",
    "files": "open files",
    "threads": "threads",
    "keys": "lasting keys",
}


def read_csv(path: pathlib.Path) -> list[Reading]:
    """Readings of an earlier soak."""
    with path.open(newline="") as file:
        return [
            Reading(
                float(row["at_s"]),
                row["process"],
                int(row["pid"]),
                float(row["rss_mb"]),
                float(row["memory_mb"]),
                int(row["files"]),
                int(row["threads"]),
                int(row["keys"]),
            )
            for row in csv.DictReader(file)
        ]
