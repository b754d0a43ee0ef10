"""Runs a program that starts services, and turns its errors into messages and exit codes."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from rich.console import Console

from miles.launcher.process import ProcessFailedError
from miles.launcher.stopping.interrupts import leave_nothing_running
from miles.rpc.exit_codes import ExitCode, ServiceExit


def run_program(program: Coroutine[Any, Any, ExitCode], console: Console) -> ExitCode:
    """Run the program in a new event loop and return its exit code. Nothing that it started is left running."""
    try:
        return asyncio.run(program)
    except ServiceExit as error:
        print_error(console, error)
        return error.code
    except ProcessFailedError as error:
        print_error(console, error)
        return ExitCode.WORKER_FAILED
    finally:
        leave_nothing_running()


def print_error(console: Console, error: Exception | str) -> None:
    """Print a message in red, without markup and without breaking its lines."""
    console.print(str(error), style="red", markup=False, soft_wrap=True)
