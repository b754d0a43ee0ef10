"""`miles workers [JOB]`: lists the worker processes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from miles.client.commands.common import Output, moment, parser, run, state_text
from miles.launcher.console import plain
from miles.rpc.exit_codes import ExitCode

if TYPE_CHECKING:
    from miles.client import MilesClient


def main(arguments: Sequence[str]) -> int:
    """List workers; return the exit code."""
    made = parser(
        "workers", "List rollout, trainer, reward and weight-sync workers, with health, load and weight version."
    )
    made.add_argument("job", nargs="?", help="only workers that serve this job")
    return run(made.parse_args(arguments), _list)


def _list(client: MilesClient, flags: argparse.Namespace, output: Output) -> int:
    workers = client.workers(flags.job)
    if output.as_json:
        output.json(workers)
        return ExitCode.OK
    table = Table("worker", "kind", "health", "activity", "version", "load", "progress", "seen", "address")
    for worker in workers:
        table.add_row(
            plain(worker["id"]),
            worker["kind"],
            state_text(worker["health"]),
            plain(worker["activity"]),
            "" if worker["version"] is None else str(worker["version"]),
            plain(", ".join(f"{name} {value:g}" for name, value in worker["load"].items())),
            str(worker["progress"]),
            moment(worker["last_seen_at"]),
            plain(worker["address"]),
        )
    output.console.print(table)
    return ExitCode.OK
