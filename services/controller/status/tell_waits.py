"""Tells people what a run waits for: in the log and in the job's history."""

from __future__ import annotations

import asyncio
import logging
from typing import NoReturn

from miles.queue.backpressure import TRANSIENT
from miles.rpc.gen import job_pb2
from miles.services.controller.jobs.history import JobHistory
from miles.services.controller.status.run_status import RunStatus

logger = logging.getLogger(__name__)

_LOOK_S = 1.0


async def tell_waits(status: RunStatus, history: JobHistory, batch_size: int) -> NoReturn:
    """Write what the run waits for once it has waited for a while, and again at growing intervals, until cancelled."""
    while True:
        await asyncio.sleep(_LOOK_S)
        for line in status.wait_news(batch_size):
            logger.info("%s", line)
            try:
                await history.log(job_pb2.LOG_LEVEL_INFO, "controller", line)
            except TRANSIENT as error:  # Redis is away: the line is in the log, and the run waits for Redis itself
                logger.info("the line is not in the job's history: %s", error)
