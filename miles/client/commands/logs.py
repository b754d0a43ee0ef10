"""`miles logs JOB [NAME]`: lists or prints the logs of the services."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from miles.client.commands.common import END_CODES, Output, moment, parser, run, size_text
from miles.launcher.console import plain
from miles.rpc.exit_codes import ExitCode

if TYPE_CHECKING:
    from miles.client import MilesClient

_POLL_S = 1.0


def main(arguments: Sequence[str]) -> int:
    """Print a log, or list the logs; return the exit code."""
    made = parser("logs", "Print the end of a service's log; without a name, list the logs.")
    made.add_argument("job", help="id of the job")
    made.add_argument("name", nargs="?", help="name of the service, e.g. rollout-0")
    made.add_argument("-f", "--follow", action="store_true", help="keep printing new lines until the job has ended")
    made.add_argument("--bytes", type=int, default=16 << 10, metavar="N", help="bytes to print from the end")
    return run(made.parse_args(arguments), _print)


def _print(client: MilesClient, flags: argparse.Namespace, output: Output) -> int:
    if flags.name is None:
        return _list(client, flags, output)
    piece = client.read_log(flags.job, flags.name, limit=flags.bytes)
    _show(piece, output)
    while flags.follow:
        ended = client.job(flags.job)["state"] in END_CODES
        more = client.read_log(flags.job, flags.name, offset=piece["next_offset"])
        if more["text"]:
            _show(more, output)
        elif ended:
            break
        else:
            time.sleep(_POLL_S)
        piece = more
    return ExitCode.OK


def _show(piece: dict[str, object], output: Output) -> None:
    if output.as_json:
        output.json(piece)
    else:
        print(piece["text"], end="", flush=True)


def _list(client: MilesClient, flags: argparse.Namespace, output: Output) -> int:
    logs = client.logs(flags.job)
    if output.as_json:
        output.json(logs)
        return ExitCode.OK
    table = Table("log", "size", "written")
    for log in logs:
        table.add_row(plain(log["name"]), size_text(log["size_bytes"]), moment(log["modified_at"]))
    output.console.print(table)
    return ExitCode.OK
