"""`miles pause|resume|stop|cancel|checkpoint JOB`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from miles.client.commands.common import Output, one_job, state_text
from miles.launcher.console import plain
from miles.rpc.exit_codes import ExitCode

if TYPE_CHECKING:
    from miles.client import MilesClient


def pause(arguments: Sequence[str]) -> int:
    """Pause a job; return the exit code."""
    return _act("pause", "Pause a job after its current activity; its workers stay loaded.", arguments)


def resume(arguments: Sequence[str]) -> int:
    """Resume a job; return the exit code."""
    return _act(
        "resume", "Continue a paused job, or resume a stopped or failed one from its newest checkpoint.", arguments
    )


def stop(arguments: Sequence[str]) -> int:
    """Stop a job; return the exit code."""
    return _act("stop", "Save a checkpoint and end the job, so that it can be resumed.", arguments)


def cancel(arguments: Sequence[str]) -> int:
    """Cancel a job; return the exit code."""
    return _act("cancel", "End a job for good, without saving.", arguments)


def checkpoint(arguments: Sequence[str]) -> int:
    """Save a checkpoint; return the exit code."""
    return _act("checkpoint", "Save a checkpoint after the current step and continue.", arguments)


def _act(action: str, description: str, arguments: Sequence[str]) -> int:
    def carry_out(client: MilesClient, flags: argparse.Namespace, output: Output) -> int:
        job = client.act(flags.job, action)
        if output.as_json:
            output.json(job)
        else:
            name = plain(job["id"])
            output.console.print(f"{action} of {name} was accepted; it is {state_text(job['state'])} now")
        return ExitCode.OK

    return one_job(action, description, arguments, carry_out)
