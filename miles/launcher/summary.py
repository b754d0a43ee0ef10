"""Summary of a finished run: a table of evaluation results before and after, and a reward curve."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from miles.telemetry import read_metrics

CURVE_NAME = "reward.png"


def print_summary(console: Console, summary: dict[str, Any], run_dir: pathlib.Path) -> None:
    """Print evaluation results before and after, how the time was spent, and where the results are."""
    evaluation = summary.get("eval", {})
    before, after = evaluation.get("before", {}), evaluation.get("after", {})
    if before or after:
        table = Table(title="Evaluation")
        table.add_column("data set")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        for name in sorted({*before, *after}):
            table.add_row(name, _number(before.get(name)), _number(after.get(name)))
        console.print(table)
    shares = ", ".join(f"{name} {share:.0%}" for name, share in summary.get("time_share", {}).items())
    console.print(
        f"{summary.get('steps', 0)} steps in {summary.get('wall_s', 0):.0f} s, "
        f"{summary.get('tokens_per_s', 0):.0f} tokens/s while generating; time: {shares}",
        highlight=False,
        soft_wrap=True,
    )
    if "hf_checkpoint" in summary:
        console.print(f"HF checkpoint: {summary['hf_checkpoint']}", highlight=False, soft_wrap=True)
    if (run_dir / CURVE_NAME).exists():
        console.print(f"reward curve:  {run_dir / CURVE_NAME}", highlight=False, soft_wrap=True)


def plot_reward(metrics_path: pathlib.Path, image_path: pathlib.Path) -> None:
    """Draw reward per step, with evaluations, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = list(read_metrics(metrics_path))
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    rewards = [(line["step"] + 1, line["rollout/raw_reward"]) for line in lines if "rollout/raw_reward" in line]
    if rewards:
        axes.plot(*zip(*rewards, strict=True), label="training reward")
    names = sorted({key for line in lines for key in line if key.startswith("eval/") and key.count("/") == 1})
    for name in names:
        points = evaluation_points(lines, name)
        axes.plot(*zip(*points, strict=True), marker="o", linestyle="--", label=name)
    axes.set(xlabel="step", ylabel="mean reward")
    axes.grid(alpha=0.3)
    if rewards or names:
        axes.legend()
    figure.savefig(image_path, dpi=120)
    pyplot.close(figure)


def evaluation_points(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """Return (steps trained, score) of each evaluation `name`, e.g. eval/sort; the one before training is at 0."""
    version = f"{name}/weight_version"
    return [(line.get(version, line["step"] + 1), line[name]) for line in lines if line.get(name) is not None]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
