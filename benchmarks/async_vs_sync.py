"""The same job synchronous, one step off and fully asynchronous: throughput and reward curve in one table.

    python examples/tiny/make.py
    python -m benchmarks.async_vs_sync --config examples/tiny/dense.yaml --num-rollout 40

Each mode is a whole run of train.py, with the same seed. `--reward-wait-s` has every reward take that long on average
(exponentially, on no core), as a judge model or a sandbox does: what asynchrony hides. Throughput is that of all steps
but the first few, in which pipelines fill. Further flags go to train.py.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import yaml

from miles.types import Sample

MODES: dict[str, tuple[str, ...]] = {
    "synchronous": ("--max-weight-staleness=0",),
    "one step off": ("--max-weight-staleness=1",),
    "asynchronous, 3 versions": ("--max-weight-staleness=3", "--use-tis"),
}
_WARM_UP = 3
_COLUMNS = 5
_WAIT = "MILES_BENCHMARK_REWARD_WAIT_S"


async def waiting_exact_match(sample: Sample) -> float:
    """1 for the label itself, after a while."""
    mean_s = float(os.environ[_WAIT])
    await asyncio.sleep(random.Random(f"{sample.group_id}.{sample.index}").expovariate(1 / mean_s))
    return float(sample.response.strip() == sample.label)


@dataclasses.dataclass(frozen=True)
class Run:
    """What came of one run."""

    steps: list[dict[str, Any]]
    evaluations: dict[str, Any]
    groups: int
    """Of a step."""

    @property
    def groups_per_s(self) -> float:
        """Trained groups per second."""
        seconds = sum(step["perf/step_time"] for step in self.steps[_WARM_UP:])
        return self.groups * len(self.steps[_WARM_UP:]) / seconds

    def rewards(self) -> list[float]:
        """Mean reward of each fifth of the run."""
        values = [step["rollout/raw_reward"] for step in self.steps]
        size = max(1, len(values) // _COLUMNS)
        return [statistics.mean(values[i * size : (i + 1) * size]) for i in range(_COLUMNS)]

    def mean(self, name: str) -> float:
        """Mean of a metric after the warm-up."""
        return statistics.mean(step[name] for step in self.steps[_WARM_UP:])


def run(name: str, flags: Sequence[str], config: str, steps: int, wait_s: float, folder: pathlib.Path) -> Run:
    """Train to the end."""
    run_dir = folder / name.replace(" ", "-").replace(",", "")
    if wait_s > 0:
        config = _with_waiting_reward(config, folder)
    command = [sys.executable, "train.py", "--config", config, f"--num-rollout={steps}", f"--run-dir={run_dir}"]
    log = run_dir.with_suffix(".log")
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", _WAIT: str(wait_s)}
    with log.open("w") as output:
        code = subprocess.run([*command, *flags], stdout=output, stderr=output, env=environment, check=False).returncode
    if code != 0:
        raise SystemExit(f"{' '.join(command)} ended with {code}:\n{log.read_text()[-4000:]}")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run_dir / "summary.json").read_text())
    return Run([line for line in lines if "perf/step_time" in line], summary.get("eval", {}), _groups(config, flags))


def _with_waiting_reward(config: str, folder: pathlib.Path) -> str:
    settings = yaml.safe_load(pathlib.Path(config).read_text())
    settings.pop("rm_type", None)
    settings["custom_rm_path"] = "benchmarks.async_vs_sync.waiting_exact_match"
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def _groups(config: str, flags: Sequence[str]) -> int:
    from miles.config.dry_run import checked_config
    from miles.config.flags import parse_command_line

    return checked_config(parse_command_line(["--config", config, *flags])).data.rollout_batch_size


def row(name: str, found: Run, base: Run) -> list[str]:
    """A row of the table."""
    after = found.evaluations.get("after", {})
    return [
        name,
        f"{found.groups_per_s:.2f}",
        f"{found.groups_per_s / base.groups_per_s:.2f}x",
        f"{found.mean('rollout/fully_async/avg_staleness'):.2f}",
        *(f"{reward:.3f}" for reward in found.rewards()),
        ", ".join(f"{value:.3f}" for value in after.values()) or "–",
    ]


def show(rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    widths = [max(len(each[i]) for each in rows) for i in range(len(rows[0]))]
    for each in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(each, widths, strict=True)))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="examples/tiny/dense.yaml")
    parser.add_argument("--num-rollout", type=int, default=40, help="steps of each run")
    parser.add_argument("--reward-wait-s", type=float, default=0.0, help="mean time of a reward; 0 is the config's own")
    flags, more = parser.parse_known_args()
    steps, wait_s = flags.num_rollout, flags.reward_wait_s
    fifths = [f"reward {20 * i}-{20 * (i + 1)} %" for i in range(_COLUMNS)]
    rows: list[list[str]] = [["mode", "groups/s", "ratio", "mean staleness", *fifths, "evaluation"]]
    base: Run | None = None
    with tempfile.TemporaryDirectory() as folder:
        for name, mode in MODES.items():
            found = run(name, [*mode, *more], flags.config, steps, wait_s, pathlib.Path(folder))
            base = base or found
            rows.append(row(name, found, base))
    show(rows)


if __name__ == "__main__":
    main()
