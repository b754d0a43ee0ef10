"""`miles list`: lists jobs, newest first."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from miles.client.commands.common import Output, moment, parser, run, state_text, steps_text
from miles.launcher.console import plain
from miles.rpc.exit_codes import ExitCode

if TYPE_CHECKING:
    from miles.client import MilesClient


def main(arguments: Sequence[str]) -> int:
    """List jobs; return the exit code."""
    made = parser("list", "Jobs, newest first.")
    made.add_argument("--state", action="append", default=[], help="only jobs in this state; repeatable")
    made.add_argument("--limit", type=int, default=20, metavar="N", help="largest number of jobs to list")
    return run(made.parse_args(arguments), _list)


def _list(client: MilesClient, flags: argparse.Namespace, output: Output) -> int:
    jobs = list(itertools.islice(client.jobs(flags.state, page_size=min(max(flags.limit, 1), 500)), flags.limit))
    if output.as_json:
        output.json(jobs)
        return ExitCode.OK
    table = Table("job", "state", "steps", "submitted", "by", "error or wait")
    for job in jobs:
        error = (job["error"] or "").splitlines()
        table.add_row(
            plain(job["id"]),
            state_text(job["state"]),
            steps_text(job),
            moment(job["submitted_at"]),
            plain(job["submitted_by"]),
            plain(error[0][:80] if error else _first_wait(job)),
        )
    output.console.print(table)
    return ExitCode.OK


def _first_wait(job: Mapping[str, Any]) -> str:
    return f"waits for {job['waits'][0]['what']}" if job["waits"] else ""
