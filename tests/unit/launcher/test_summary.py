"""The reward curve."""

from __future__ import annotations

import pathlib

from miles.launcher.summary import evaluation_points, plot_reward
from miles.telemetry import MetricsWriter, read_metrics


def test_evaluations_are_drawn_at_the_steps_that_their_weights_were_trained_for(tmp_path: pathlib.Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write(0, {"rollout/raw_reward": 0.2})
    writer.write(0, {"eval/sort": 0.1, "eval/sort/weight_version": 0})
    writer.write(0, {"eval/sort": 0.3, "eval/sort/weight_version": 1})
    writer.write(4, {"eval/sort": 0.5, "eval/sort/weight_version": 5})
    writer.close()
    lines = list(read_metrics(tmp_path / "metrics.jsonl"))
    assert evaluation_points(lines, "eval/sort") == [(0, 0.1), (1, 0.3), (5, 0.5)]
    plot_reward(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 0
