"""Spans of what a process did last, kept in memory, from which the trace of a step is written when it is asked for.

Recording is always on: a span costs some microseconds, and only the last `KEPT` are kept. So a step can be traced
after it has ended, also one that turned out to be slow.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import inspect
import json
import os
import pathlib
import threading
import time
import urllib.parse
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])

KEPT = 65_536
"""Spans that a process keeps; the oldest are dropped."""

_Recorded = tuple[str, int, int, int, str]
_recorded: collections.deque[_Recorded] = collections.deque(maxlen=KEPT)
"""Name, begin and end in nanoseconds since the Unix epoch, thread, detail. Appending is atomic."""


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Something that a process did from one moment to another."""

    name: str
    """What was done: the same words each time."""
    begin_ns: int
    """Nanoseconds since the Unix epoch; so `end_ns`."""
    end_ns: int
    thread: int
    detail: str = ""
    """On what, e.g. a group's number."""


class span:
    """A context manager that records its block as a span; the block may await."""

    __slots__ = ("_begin_ns", "_detail", "_name")

    def __init__(self, name: str, detail: object = "") -> None:
        self._name = name
        self._detail = detail

    def __enter__(self) -> None:
        self._begin_ns = time.time_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        record(self._name, self._begin_ns, detail=self._detail)


def traced(name: str, detail: Callable[..., object] | None = None) -> Callable[[_F], _F]:
    """A decorator that records each call of a function or coroutine function as a span.

    `detail` is called with the function's arguments.
    """

    def decorate(function: _F) -> _F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:  # without `span`, which takes as long again: some are called often
            said = "" if detail is None else detail(*args, **kwargs)
            begin_ns = time.time_ns()
            try:
                return function(*args, **kwargs)
            finally:
                record(name, begin_ns, detail=said)

        @functools.wraps(function)
        async def call_async(*args: Any, **kwargs: Any) -> Any:
            with span(name, "" if detail is None else detail(*args, **kwargs)):
                return await function(*args, **kwargs)

        return call_async if inspect.iscoroutinefunction(function) else call  # type: ignore[return-value]

    return decorate


def record(name: str, begin_ns: int, end_ns: int | None = None, detail: object = "") -> None:
    """Record a span that began at `begin_ns`, in nanoseconds since the Unix epoch, and ends now or at `end_ns`."""
    _recorded.append((name, begin_ns, end_ns or time.time_ns(), threading.get_ident(), str(detail)))


def spans_between(begin_ns: int, end_ns: int) -> list[Span]:
    """Return the recorded spans that overlap a time, in the order in which they ended."""
    return [Span(*one) for one in _copied() if one[1] < end_ns and one[2] > begin_ns]


def _copied() -> tuple[_Recorded, ...]:
    while True:
        try:
            return tuple(_recorded)
        except RuntimeError:  # another thread has recorded meanwhile
            continue


def spans_file(folder: pathlib.Path, process: str) -> pathlib.Path:
    """Return the file in a folder that has a process's spans; names may have any characters."""
    return folder / f"{urllib.parse.quote(process, safe='')}.json"


def write_spans(folder: pathlib.Path, process: str, begin_ns: int, end_ns: int) -> pathlib.Path:
    """Write this process's spans of a time to its file in the folder, whole or not at all; return the file.

    Raises OSError when that cannot be done.
    """
    spans = [dataclasses.astuple(one) for one in spans_between(begin_ns, end_ns)]
    file = spans_file(folder, process)
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps({"process": process, "pid": os.getpid(), "spans": spans}))
    partial.replace(file)
    return file
