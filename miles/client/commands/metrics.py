"""`miles metrics JOB [NAME ...]`: prints per-step metrics of a job."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from miles.client.commands.common import Output, parser, run
from miles.launcher.console import plain
from miles.rpc.exit_codes import ExitCode

if TYPE_CHECKING:
    from miles.client import MilesClient


def main(arguments: Sequence[str]) -> int:
    """Print metrics; return the exit code."""
    made = parser("metrics", "Print per-step metrics of a job; without names, list the metrics.")
    made.add_argument("job", help="id of the job")
    made.add_argument("name", nargs="*", help="name of a metric, or a prefix such as 'train/*'")
    made.add_argument("--start", type=int, default=0, metavar="STEP", help="first training step")
    made.add_argument("--end", type=int, metavar="STEP", help="last training step")
    made.add_argument(
        "--step", type=int, default=1, metavar="N", help="print one mean value for every N training steps"
    )
    return run(made.parse_args(arguments), _print)


def _print(client: MilesClient, flags: argparse.Namespace, output: Output) -> int:
    names = flags.name or ["(none)"]
    found = client.metrics(flags.job, names, start=flags.start, end=flags.end, step=flags.step)
    if output.as_json:
        output.json(found)
    elif not flags.name:
        for name in found["names"]:
            output.console.print(name, markup=False)
    else:
        columns = {
            series["name"]: dict(zip(series["steps"], series["values"], strict=True)) for series in found["series"]
        }
        table = Table("step", *map(plain, columns))
        for step in sorted({step for values in columns.values() for step in values}):
            cells = [values.get(step) for values in columns.values()]
            table.add_row(str(step), *("" if value is None else f"{value:.5g}" for value in cells))
        output.console.print(table)
    return ExitCode.OK
