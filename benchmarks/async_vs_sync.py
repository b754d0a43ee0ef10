"""The same job synchronous, one step off and fully asynchronous: throughput and reward curve in one table.

    python examples/tiny/make.py
    python -m benchmarks.async_vs_sync --config examples/tiny/dense.yaml --num-rollout 40

Each mode is a whole run of train.py, repeated with other seeds, of which every mode gets the same; modes take turns, so
that whatever else the machine does meets all of them. All train on as many samples, which is checked, and are evaluated
on the same set before and after, and not in between. `--reward-wait-s` has every reward take that long on average
(exponentially, on no core), as a judge model or a sandbox does: what asynchrony hides. Throughput is that of all steps
but the first few, in which pipelines fill; it and the ratio to the synchronous run of the same seed are medians, with
the range in brackets. Rewards and evaluations are means over the repeats: the rewards of tenths of a run, as trained
on, so of samples as stale as the mode allows. Further flags go to train.py.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import math
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
_COLUMNS = 10
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

    @property
    def samples(self) -> int:
        """Trained on in all."""
        return int(sum(step["rollout/samples"] for step in self.steps))

    def rewards(self) -> list[float]:
        """Mean reward of each tenth of the run."""
        values = [step["rollout/raw_reward"] for step in self.steps]
        ends = [i * len(values) // _COLUMNS for i in range(_COLUMNS + 1)]
        return [statistics.mean(values[start:end]) for start, end in itertools.pairwise(ends)]

    def evaluation(self, when: str) -> float:
        """Mean over the evaluation sets, `before` or `after` training; NaN without one."""
        return statistics.mean(self.evaluations.get(when, {}).values() or [math.nan])

    def mean(self, name: str) -> float:
        """Mean of a metric after the warm-up."""
        return statistics.mean(step[name] for step in self.steps[_WARM_UP:])


def run(run_dir: pathlib.Path, flags: Sequence[str], config: str, steps: int, wait_s: float) -> Run:
    """Train to the end."""
    if wait_s > 0:
        config = _with_waiting_reward(config, run_dir.parent)
    command = [sys.executable, "train.py", "--config", config, f"--num-rollout={steps}", f"--run-dir={run_dir}"]
    command.append(f"--eval-interval={steps}")
    log = run_dir.with_suffix(".log")
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", _WAIT: str(wait_s)}
    with log.open("w") as output:
        code = subprocess.run([*command, *flags], stdout=output, stderr=output, env=environment, check=False).returncode
    if code != 0:
        raise SystemExit(f"{' '.join(command)} ended with {code}:\n{log.read_text()[-4000:]}")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run_dir / "summary.json").read_text())
    taken = [line for line in lines if "perf/step_time" in line]
    if [line["step"] for line in taken] != list(range(steps)):
        raise SystemExit(f"{run_dir} has metrics of steps {[line['step'] for line in taken]}, not of {steps}")
    return Run(taken, summary.get("eval", {}), _groups(config, flags))


def _with_waiting_reward(config: str, folder: pathlib.Path) -> str:
    settings = yaml.safe_load(pathlib.Path(config).read_text())
    settings.pop("rm_type", None)
    settings["custom_rm_path"] = "benchmarks.async_vs_sync.waiting_exact_match"
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def _groups(config: str, flags: Sequence[str]) -> int:
    from miles.config.command.flags import parse_command_line
    from miles.launcher.dry_run import checked_config

    return checked_config(parse_command_line(["--config", config, *flags])).data.rollout_batch_size


def row(name: str, found: Sequence[Run], base: Sequence[Run]) -> list[str]:
    """A row of the table, of runs with the same seeds as those of `base`."""
    rates = [run.groups_per_s for run in found]
    ratios = [run.groups_per_s / other.groups_per_s for run, other in zip(found, base, strict=True)]
    rewards = [statistics.mean(tenths) for tenths in zip(*(run.rewards() for run in found), strict=True)]
    return [
        name,
        f"{statistics.median(rates):.2f} ({min(rates):.2f}–{max(rates):.2f})",
        f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}–{max(ratios):.2f})",
        f"{statistics.mean(run.mean('rollout/fully_async/avg_staleness') for run in found):.2f}",
        f"{found[0].samples}",
        *(f"{reward:.3f}" for reward in rewards),
        *(f"{statistics.mean(run.evaluation(when) for run in found):.3f}" for when in ("before", "after")),
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
    parser.add_argument("--repeats", type=int, default=3, help="runs of each mode, with a seed each")
    parser.add_argument("--reward-wait-s", type=float, default=0.0, help="mean time of a reward; 0 is the config's own")
    flags, more = parser.parse_known_args()
    steps = flags.num_rollout
    if steps < max(_COLUMNS, _WARM_UP + 1):
        parser.error(f"--num-rollout {steps} is too few for a curve; take {_COLUMNS} or more")
    runs: dict[str, list[Run]] = {name: [] for name in MODES}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(flags.repeats):
            for number, (name, mode) in enumerate(MODES.items()):
                run_dir = pathlib.Path(folder) / f"{seed}-{number}" / "run"
                run_dir.parent.mkdir()
                own = [*mode, f"--seed={seed}", f"--rollout-seed={seed}", *more]
                runs[name].append(run(run_dir, own, flags.config, steps, flags.reward_wait_s))
                print(f"seed {seed}, {name}: {runs[name][-1].groups_per_s:.2f} groups/s", file=sys.stderr)
    if len({run.samples for found in runs.values() for run in found}) != 1:
        raise SystemExit(
            f"not the same work: { ({name: [run.samples for run in found] for name, found in runs.items()}) }"
        )
    base = next(iter(runs.values()))
    curve = [f"{100 * i // _COLUMNS}%" for i in range(1, _COLUMNS + 1)]
    header = ["mode", "groups/s", "ratio", "staleness", "samples", *("reward to " + curve[0], *curve[1:])]
    show([[*header, "eval before", "after"], *(row(name, found, base) for name, found in runs.items())])


if __name__ == "__main__":
    main()
