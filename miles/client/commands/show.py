"""`miles show JOB`: prints a job's state, results, drafts and settings."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from miles.client.commands.acceptance import acceptance_table, engines_table
from miles.client.commands.common import Output, moment, parser, run, state_text, steps_text, wait_text
from miles.config.given import given_settings
from miles.launcher.console import plain
from miles.rpc.exit_codes import ExitCode

if TYPE_CHECKING:
    from miles.client import MilesClient


def main(arguments: Sequence[str]) -> int:
    """Show a job; return the exit code."""
    made = parser("show", "Print a job's state, its results, and the settings that differ from their defaults.")
    made.add_argument("job", help="id of the job")
    return run(made.parse_args(arguments), _show)


def _show(client: MilesClient, flags: argparse.Namespace, output: Output) -> int:
    job = client.job(flags.job)
    if output.as_json:
        output.json(job)
        return ExitCode.OK
    table = Table(show_header=False, box=None)
    table.add_row("job", plain(job["id"]))
    table.add_row("state", state_text(job["state"]))
    table.add_row("steps", steps_text(job))
    table.add_row("device", plain(str(job["config"].get("device", ""))))
    for key in ("submitted_at", "started_at", "ended_at"):
        table.add_row(key.removesuffix("_at"), moment(job[key]))
    table.add_row("submitted by", plain(job["submitted_by"] or "the command line"))
    now = datetime.datetime.now(datetime.UTC)
    for number, wait in enumerate(job["waits"]):
        table.add_row("" if number else "waits for", plain(wait_text(wait, now)))
    if job["error"]:
        table.add_row("error", f"[red]{plain(job['error'])}[/]")
    acceptance = job["summary"].pop("acceptance", [])
    for name, value in _flattened(job["summary"]):
        table.add_row(name, plain(value))
    output.console.print(table)
    if acceptance:
        output.console.print("\nspeculative decoding:", style="bold")
        engines = client.status(flags.job)["speculation"]
        if engines:
            output.console.print(engines_table(engines))
        output.console.print(acceptance_table(acceptance))
    output.console.print("\nsettings that differ from their defaults:", style="bold")
    settings = Table(show_header=False, box=None)
    for key, value in sorted(given_settings(job["config"]).items()):
        settings.add_row(key, plain(json.dumps(value, ensure_ascii=False)))
    output.console.print(settings)
    return ExitCode.OK


def _flattened(summary: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in summary.items():
        if isinstance(value, Mapping):
            rows += _flattened(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, f"{value:.4g}" if isinstance(value, float) else str(value)))
    return rows
