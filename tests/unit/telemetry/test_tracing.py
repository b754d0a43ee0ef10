"""What a process records, and what of it is written."""

from __future__ import annotations

import asyncio
import json
import pathlib
import time

import pytest

from miles.telemetry import tracing
from miles.telemetry.tracing import record, span, spans_between, traced, write_spans


def recorded_since(begin_ns: int) -> list[tuple[str, str]]:
    return [(one.name, one.detail) for one in spans_between(begin_ns, time.time_ns() + 1)]


def test_a_block_is_a_span_also_when_it_raises() -> None:
    begin = time.time_ns()
    with pytest.raises(RuntimeError, match="no"), span("outer", 7), span("inner"):
        raise RuntimeError("no")
    assert recorded_since(begin) == [("inner", ""), ("outer", "7")]


async def test_calls_of_functions_and_coroutine_functions_are_spans_of_their_whole_time() -> None:
    @traced("add", lambda a, b: f"{a} and {b}")
    def add(a: int, b: int) -> int:
        return a + b

    @traced("add later")
    async def add_later(a: int, b: int) -> int:
        await asyncio.sleep(0)
        return add(a, b=b)

    begin = time.time_ns()
    assert await add_later(1, 2) == 3
    assert add_later.__name__ == "add_later"
    inner, outer = spans_between(begin, time.time_ns() + 1)
    assert (inner.name, inner.detail, outer.name) == ("add", "1 and 2", "add later")
    assert outer.begin_ns <= inner.begin_ns <= inner.end_ns <= outer.end_ns


def test_only_spans_that_overlap_the_time_are_written(tmp_path: pathlib.Path) -> None:
    begin = time.time_ns() + 10**15  # a time that no other test records in
    for name, first, last in (("before", 0, 10), ("into", 5, 15), ("within", 12, 13), ("after", 20, 30)):
        record(name, begin + first, begin + last)
    file = write_spans(tmp_path / "new" / "step-1", "rollout-0", begin + 10, begin + 20)
    written = json.loads(file.read_text())
    assert written["process"] == "rollout-0"
    assert [(name, first - begin, last - begin) for name, first, last, _, _ in written["spans"]] == [
        ("into", 5, 15),
        ("within", 12, 13),
    ]
    assert [each.name for each in file.parent.iterdir()] == ["rollout-0.json"]


def test_a_process_keeps_only_its_last_spans() -> None:
    begin = time.time_ns() + 2 * 10**15
    for number in range(tracing.KEPT + 10):
        record("many", begin + number, begin + number + 1, detail=number)
    kept = [int(one.detail) for one in spans_between(begin, begin + 2 * tracing.KEPT)]
    assert kept[-1] == tracing.KEPT + 9
    assert kept[0] >= 10  # other threads may record meanwhile, and then fewer of these are kept
