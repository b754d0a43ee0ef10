"""The trace of a step as a table and as events of a timeline."""

from __future__ import annotations

import itertools
import json
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.telemetry import trace_command
from miles.telemetry.trace_budget import budget, covered, phase_lengths
from miles.telemetry.trace_events import lanes, trace_events
from miles.telemetry.trace_files import Trace, read_trace, traced_steps
from miles.telemetry.tracing import Span

MS = 1_000_000
BEGIN = 1_790_000_000_000_000_000


def at(name: str, begin_ms: int, end_ms: int, detail: str = "") -> Span:
    return Span(name, BEGIN + begin_ms * MS, BEGIN + end_ms * MS, 1, detail)


@pytest.fixture
def run_dir(tmp_path: pathlib.Path) -> pathlib.Path:
    """A run with traces of steps 3 and 12."""
    for step in (12, 3):
        folder = tmp_path / "traces" / f"step-{step}"
        folder.mkdir(parents=True)
        phases = {"collect": [BEGIN, BEGIN + 60 * MS], "train": [BEGIN + 60 * MS, BEGIN + 100 * MS]}
        (folder / "phases.json").write_text(json.dumps({"step": step, "phases": phases}))
        spans = [at("generate", -5, 30, "8"), at("generate", 20, 50, "9"), at("put", 50, 52), at("load", 90, 120)]
        written = [[s.name, s.begin_ns, s.end_ns, s.thread, s.detail] for s in spans]
        (folder / "rollout-0.json").write_text(json.dumps({"process": "rollout/0", "pid": 1, "spans": written}))
    return tmp_path


def test_rows_say_how_long_at_least_one_was_under_way_in_each_phase(run_dir: pathlib.Path) -> None:
    trace = read_trace(run_dir, 3)
    assert phase_lengths(trace) == {"collect": 0.06, "train": 0.04}
    rows = {row.name: row for row in budget(trace)}
    assert list(rows) == ["generate", "load", "put"]
    assert (rows["generate"].count, rows["generate"].busy_s) == (2, {"collect": 0.05, "train": 0.0})
    assert rows["generate"].longest_s == 0.03
    assert rows["load"].busy_s == {"collect": 0.0, "train": 0.01}


def test_the_command_prints_the_last_step_and_writes_events(
    run_dir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert traced_steps(run_dir) == [3, 12]
    out = run_dir / "trace.json"
    assert trace_command.main([str(run_dir), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "step 12: 100.0 ms" in printed
    assert ["rollout/0", "generate", "2", "30.0", "50.0", "50.0", "0.0"] in [
        line.split() for line in printed.splitlines()
    ]
    names = [event["name"] for event in json.loads(out.read_text())["traceEvents"] if event["ph"] == "X"]
    assert names == ["collect", "train", "generate", "generate", "put", "load"]


def test_the_command_names_the_steps_that_have_traces(
    run_dir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trace_command.main([str(run_dir), "--step", "4"]) == 2
    assert "no trace of step 4; it has traces of steps 3, 12" in capsys.readouterr().err
    assert trace_command.main([str(run_dir / "traces")]) == 2
    assert "--trace-steps" in capsys.readouterr().err


def test_a_damaged_file_is_named(run_dir: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "traces" / "step-3" / "rollout-0.json").write_text('{"process": "rol')
    assert trace_command.main([str(run_dir), "--step", "3"]) == 2
    assert "rollout-0.json is not a trace file" in capsys.readouterr().err


intervals = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 10)).map(lambda p: (p[0], p[0] + p[1])), max_size=12)


@given(intervals)
def test_the_covered_time_is_the_number_of_covered_moments(found: list[tuple[int, int]]) -> None:
    assert covered(found) == len({moment for begin, end in found for moment in range(begin, end)})


@given(intervals)
def test_spans_on_one_lane_nest_or_are_apart(found: list[tuple[int, int]]) -> None:
    spans = [Span("x", begin, end, 1) for begin, end in found]
    for (a, lane_a), (b, lane_b) in itertools.combinations(zip(spans, lanes(spans), strict=True), 2):
        apart = a.end_ns <= b.begin_ns or b.end_ns <= a.begin_ns
        a_in_b = b.begin_ns <= a.begin_ns and a.end_ns <= b.end_ns
        b_in_a = a.begin_ns <= b.begin_ns and b.end_ns <= a.end_ns
        assert lane_a != lane_b or apart or a_in_b or b_in_a


def test_events_begin_at_the_step_and_name_their_process() -> None:
    trace = Trace(1, {"collect": (BEGIN, BEGIN + MS)}, {"reward-0": [at("score", 1, 3, "group 4")]})
    events = trace_events(trace)["traceEvents"]
    assert {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "reward-0"}} in events
    assert events[-1] == {
        "ph": "X",
        "name": "score",
        "pid": 1,
        "tid": 0,
        "ts": 1000.0,
        "dur": 2000.0,
        "args": {"detail": "group 4"},
    }
