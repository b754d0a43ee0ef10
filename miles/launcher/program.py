"""Runs a program that starts services, and turns its errors into messages and exit codes."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine, Sequence
from typing import Any

from rich.console import Console

from miles.launcher.process import ProcessFailedError
from miles.launcher.restart_policy import PERMANENT
from miles.launcher.stopping.interrupts import leave_nothing_running
from miles.rpc.exit_codes import ExitCode, ServiceExit
from miles.telemetry.redaction import redact

logger = logging.getLogger(__name__)


def run_program(program: Coroutine[Any, Any, ExitCode], console: Console) -> ExitCode:
    """Run the program in a new event loop and return its exit code. Nothing that it started is left running."""
    try:
        return asyncio.run(program)
    except ServiceExit as error:
        print_error(console, error)
        return error.code
    except ProcessFailedError as error:
        print_error(console, error)
        return ExitCode(error.exit_code) if error.exit_code in PERMANENT else ExitCode.WORKER_FAILED
    finally:
        leave_nothing_running()


def why_not_here() -> str | None:
    """Return why no program can be started from the working directory, if so."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the working directory was deleted; change to another one"
    return None


def warn_of_secrets(arguments: Sequence[str]) -> None:
    """Warn of a password, key or token on the command line, which every user of the machine can read."""
    line = " ".join(arguments)
    if redact(line) != line:
        logger.warning(
            "everybody on this machine can read the secret in this command line; write the setting into a --config file"
        )


def print_error(console: Console, error: Exception | str) -> None:
    """Print a message in red, without markup and without breaking its lines."""
    console.print(str(error), style="red", markup=False, soft_wrap=True)
