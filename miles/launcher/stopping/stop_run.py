"""Stops a job on a local cluster: asks the controller to, prints what it waits for, and ends at the limit."""

from __future__ import annotations

import asyncio
import time
from typing import NoReturn

from rich.console import Console

from miles.launcher.job_client import JobClient
from miles.launcher.stopping.interrupts import Interrupts, end_at_once
from miles.launcher.stopping.stop_progress import StopProgress
from miles.rpc import ExitCode

_POLL_S = 0.5


async def stop_run(job: JobClient, limit_s: float, console: Console, interrupts: Interrupts) -> NoReturn:
    """Have the job saved and stopped; cancel this when the job has ended. Ends the process when the limit passes."""
    progress = StopProgress(limit_s, time.monotonic())
    while True:
        text = progress.update(time.monotonic(), await job.describe_run())
        interrupts.last_words = f"stopped at once. {progress.resume_hint()}"
        if text:
            console.print(text, style="yellow", markup=False, soft_wrap=True)
        if progress.timed_out:
            end_at_once(
                ExitCode.NOT_SAVED if progress.loses_steps else ExitCode.INTERRUPTED, progress.timeout_message()
            )
        # Each time: a controller that has restarted does not know of the request.
        await job.request_stop()
        await asyncio.sleep(_POLL_S)
