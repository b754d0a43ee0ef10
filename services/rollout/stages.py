"""Progress reports from a slow stage of a job's start."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from miles.tasks import cancelled_at_end

REPORT_EVERY_S = 60.0


async def report_stage(
    stage: str, work: Coroutine[Any, Any, None], every_s: float = REPORT_EVERY_S
) -> AsyncGenerator[str, None]:
    """Run `work`, yielding a progress report at its start and then regularly, since callers take silence for a hang."""
    began = time.monotonic()
    task = asyncio.create_task(work)
    async with cancelled_at_end(task):
        yield stage
        while not (await asyncio.wait({task}, timeout=every_s))[0]:
            yield f"{stage}, for {time.monotonic() - began:.0f} s now"
        task.result()
