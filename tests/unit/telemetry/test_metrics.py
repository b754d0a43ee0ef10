"""The metrics file."""

from __future__ import annotations

import json
import pathlib

from miles.telemetry import MetricsWriter, read_metrics


def test_lines_come_back_and_not_a_number_is_null(tmp_path: pathlib.Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write(0, {"train/loss": 0.5, "train/kl": float("nan")})
    writer.close()
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (line["step"], line["train/loss"], line["train/kl"]) == (0, 0.5, None)


def test_a_resumed_run_replaces_the_lines_of_steps_it_takes_again(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    for step in range(5):
        writer.write(step, {"a": step})
    writer.close()
    writer = MetricsWriter(path, first_step=3)
    writer.write(3, {"a": 30})
    writer.close()
    assert [(line["step"], line["a"]) for line in read_metrics(path)] == [(0, 0), (1, 1), (2, 2), (3, 30)]


def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 0, "a": 1}) + "\n" + '{"step": 1, "a"')
    writer = MetricsWriter(path, first_step=9)
    writer.write(9, {"a": 9})
    writer.close()
    assert [line["step"] for line in read_metrics(path)] == [0, 9]
