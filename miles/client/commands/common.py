"""Shared parts of all commands: flags, output, and exit codes of errors."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from miles.launcher.console import HelpFormatter, RunConsole
from miles.rpc.exit_codes import ExitCode

if TYPE_CHECKING:
    from miles.client import MilesClient

END_CODES: Mapping[str, ExitCode] = {
    "succeeded": ExitCode.OK,
    "failed": ExitCode.JOB_FAILED,
    "cancelled": ExitCode.JOB_CANCELLED,
    "stopped": ExitCode.INTERRUPTED,
}
"""Exit code of a command that watches a job, by the state in which the job ended."""

STYLES: Mapping[str, str] = {
    "running": "green",
    "starting": "cyan",
    "queued": "dim",
    "paused": "yellow",
    "recovering": "yellow",
    "succeeded": "bold green",
    "failed": "bold red",
    "cancelled": "magenta",
    "stopped": "magenta",
    "good": "green",
    "stuck": "yellow",
    "quarantined": "yellow",
    "lost": "red",
}


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """Build a parser with the flags of every command."""
    made = argparse.ArgumentParser(prog=f"miles {command}", description=description, formatter_class=HelpFormatter)
    made.add_argument("--url", help="address of the gateway; default: $MILES_URL, else http://127.0.0.1:8000")
    key = "file that holds the API key; default: the key in $MILES_API_KEY"
    made.add_argument("--key-file", type=pathlib.Path, metavar="FILE", help=key)
    made.add_argument(
        "--ca", metavar="FILE", help="CA certificates to trust for https (PEM); default: those of the system"
    )
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


class Output:
    """Prints text for people, or JSON for programs."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.console = RunConsole()

    def json(self, value: Any) -> None:
        """Print a JSON value on one line."""
        print(json.dumps(value, ensure_ascii=False), flush=True)

    def error(self, text: str) -> None:
        """Print an error to standard error."""
        RunConsole(stderr=True).print(text, style="red", markup=False)


Action = Callable[["MilesClient", argparse.Namespace, Output], int]


def run(flags: argparse.Namespace, action: Action) -> int:
    """Connect to the gateway and run `action`; turn errors into messages and exit codes."""
    output = Output(flags.json)
    if importlib.util.find_spec("httpx") is None:
        output.error("httpx is not installed; pip install 'miles[client]'")
        return ExitCode.INTERNAL
    from miles.client import GatewayUnreachableError, MilesClient, MilesError, UnexpectedAnswerError

    key = None
    if flags.key_file is not None:
        try:
            key = flags.key_file.read_text().strip()
        except OSError as error:
            output.error(f"--key-file {flags.key_file} cannot be read: {error.strerror}")
            return ExitCode.BAD_CONFIG
    try:
        made = MilesClient(flags.url, key, verify=flags.ca or True)
    except ValueError as error:
        output.error(str(error))
        return ExitCode.BAD_CONFIG
    except GatewayUnreachableError as error:
        output.error(str(error))
        return ExitCode.GATEWAY_UNREACHABLE
    try:
        with made as client:
            return action(client, flags, output)
    except MilesError as error:
        if flags.json:
            print(json.dumps(error.problem), file=sys.stderr)
        else:
            output.error(error.describe())
        return ExitCode.BAD_CONFIG if error.status == 422 else ExitCode.REFUSED
    except (GatewayUnreachableError, UnexpectedAnswerError) as error:
        output.error(str(error))
        return ExitCode.GATEWAY_UNREACHABLE
    except KeyError as error:  # in a JSON object of another server, or of a gateway of another version
        output.error(
            f"{made.url} answered without {error}, as no gateway of this version does; check the address (--url)"
        )
        return ExitCode.GATEWAY_UNREACHABLE
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED


def state_text(state: str) -> str:
    """Format a state or health in its colour, for rich."""
    return f"[{STYLES.get(state, 'white')}]{state}[/]"


def moment(text: str | None) -> str:
    """Format a time of the API in local time, to the second."""
    if not text:
        return ""
    return datetime.datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def size_text(size: float) -> str:
    """Format a number of bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def wait_text(wait: Mapping[str, Any], now: datetime.datetime) -> str:
    """Say what a job waits for, since when, and how that ends."""
    counted = f" ({wait['samples']} samples waiting)" if wait["samples"] else ""
    detail = f": {wait['detail']}" if wait["detail"] else ""
    end = f"; {wait['ending']}" if wait["ending"] else ""
    if wait["gives_up_at"]:
        end = f"; gives up in {_length(datetime.datetime.fromisoformat(wait['gives_up_at']) - now)}{end}"
    return f"{wait['what']} for {_length(now - datetime.datetime.fromisoformat(wait['since']))}{counted}{detail}{end}"


def _length(span: datetime.timedelta) -> str:
    seconds = max(0.0, span.total_seconds())
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def steps_text(job: Mapping[str, Any]) -> str:
    """Format the steps done and the steps in all."""
    return f"{job['policy_version']}/{job['num_rollout'] or '?'}"


def one_job(command: str, description: str, arguments: Sequence[str], action: Action) -> int:
    """Run a command whose only argument is a job."""
    made = parser(command, description)
    made.add_argument("job", help="id of the job")
    return run(made.parse_args(arguments), action)
