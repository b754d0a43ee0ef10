"""`miles submit`: submits a job to a gateway, with the flags and files that train.py takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from miles.client.commands.common import Output, parser, run
from miles.client.commands.watch import follow
from miles.config import ConfigError
from miles.config.command.flags import parse_command_line
from miles.rpc.exit_codes import ExitCode

if TYPE_CHECKING:
    from miles.client import MilesClient


def main(arguments: Sequence[str]) -> int:
    """Submit a job; return the exit code."""
    made = parser(
        "submit",
        "Submit a job. All flags of train.py are accepted (--config FILE, --lr 1e-6; `miles config docs` lists them). "
        "Paths are on the machine that trains; relative paths start at the gateway's first allowed root.",
    )
    made.allow_abbrev = False
    key = "key of this submission: repeating it with the same key makes no second job; default: a random key"
    made.add_argument("--idempotency-key", metavar="TEXT", help=key)
    made.add_argument("--check", action="store_true", help="only check the configuration")
    made.add_argument("--watch", action="store_true", help="watch the job until it ends")
    flags, words = made.parse_known_args(arguments)
    output = Output(flags.json)
    try:
        config = typed_settings(words)
    except ConfigError as error:
        if flags.json:
            output.json({"faults": [fault.to_json() for fault in error.faults]})
        else:
            output.error(str(error))
        return ExitCode.BAD_CONFIG

    def submit(client: MilesClient, flags: argparse.Namespace, output: Output) -> int:
        if flags.check:
            client.check(config)
            output.json({"faults": []}) if output.as_json else output.console.print("the configuration has no faults")
            return ExitCode.OK
        job = client.submit(config, idempotency_key=flags.idempotency_key)
        if output.as_json:
            output.json(job)
        else:
            output.console.print(f"job {job['id']} is {job['state']}; watch it with: miles watch {job['id']}")
        return follow(client, job["id"], output) if flags.watch else ExitCode.OK

    return run(flags, submit)


def typed_settings(words: Sequence[str]) -> dict[str, Any]:
    """Return the settings of flags and files, each with its JSON type. Raises ConfigError with every fault."""
    line = parse_command_line(words)
    flat = line.config().to_flat()
    return {key: flat[key] for key in line.flat if key in flat}
