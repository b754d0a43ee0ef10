"""`miles versions JOB`: lists versions of the weights, what each engine holds and accepts, or checks the engines."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from miles.client.commands.acceptance import acceptance_table
from miles.client.commands.common import Output, moment, parser, run, size_text, state_text
from miles.launcher.console import plain
from miles.rpc.exit_codes import ExitCode

if TYPE_CHECKING:
    from miles.client import MilesClient
    from miles.client.client import Json


def main(arguments: Sequence[str]) -> int:
    """List versions and engines, or check engines; return the exit code."""
    made = parser(
        "versions",
        "List versions of a job's weights with size and seconds per stage, what each engine holds, and how many drafts "
        "of speculative decoding were accepted by each version.",
    )
    made.add_argument("job", help="id of the job")
    made.add_argument(
        "--check",
        action="store_true",
        help="make every engine compare its weights with those that the trainer sent; fail if one differs",
    )
    return run(made.parse_args(arguments), _run)


def _run(client: MilesClient, flags: argparse.Namespace, output: Output) -> int:
    answer = client.check_versions(flags.job) if flags.check else client.versions(flags.job)
    code = ExitCode.INTERNAL if answer.get("quarantined") else ExitCode.OK
    if output.as_json:
        output.json(answer)
        return code
    if flags.check:
        found = f"version {answer['version']}: {answer['equal']} engines are equal, {answer['quarantined']} are not"
        output.console.print(found, markup=False)
    else:
        output.console.print(_versions(answer))
    output.console.print(_engines(answer))
    if answer.get("acceptance"):
        output.console.print(acceptance_table(answer["acceptance"]))
    return code


def _versions(answer: Json) -> Table:
    table = Table("stream", "version", "state", "active since", "size", "written", "transports", "seconds per stage")
    for version in answer["versions"]:
        table.add_row(
            version["stream"],
            str(version["version"]),
            state_text(version["state"]),
            moment(version["active_at"]),
            size_text(version["size_bytes"]),
            size_text(version["written_bytes"]),
            ", ".join(version["transports"]),
            _stages(version["stage_s"]),
        )
    return table


def _engines(answer: Json) -> Table:
    table = Table(
        "engine", "stream", "state", "version", "since", "size", "transport", "seconds per stage", "last error"
    )
    for engine in answer["engines"]:
        table.add_row(
            plain(engine["engine"]),
            engine["stream"],
            state_text(engine["state"]) + ("" if engine["attached"] else " (away)"),
            "" if engine["version"] is None else str(engine["version"]),
            moment(engine["since"]),
            size_text(engine["size_bytes"]),
            engine["transport"] or "",
            _stages({**engine["stage_s"], "pause": engine["pause_s"]}),
            plain(engine["last_error"] or ""),
        )
    return table


def _stages(stages: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {seconds:.3g}" for name, seconds in stages.items())
