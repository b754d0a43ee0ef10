"""Reports a run's progress: lines in the job's history, and totals in its summary."""

from __future__ import annotations

import logging
import time

from miles.rpc.gen import job_pb2
from miles.services.controller.jobs.history import JobHistory
from miles.services.controller.run.alerts import RunAlerts
from miles.services.controller.status.activity import ActivityClock

logger = logging.getLogger(__name__)


class RunReport:
    """Writes to the log and to the job's history."""

    def __init__(self, history: JobHistory, clock: ActivityClock, alerts: RunAlerts) -> None:
        self._history = history
        self._clock = clock
        self._alerts = alerts
        self._began = time.monotonic() - float(history.summary.get("wall_s", 0.0))

    async def info(self, text: str) -> None:
        """Write a line that is worth knowing."""
        logger.info("%s", text)
        await self._history.log(job_pb2.LOG_LEVEL_INFO, "controller", text)

    def info_later(self, text: str) -> None:
        """Write a line that is worth knowing while the caller goes on."""
        logger.info("%s", text)
        self._history.log_later(job_pb2.LOG_LEVEL_INFO, "controller", text)

    async def warn(self, text: str) -> None:
        """Write a line that a person should see."""
        logger.warning("%s", text)
        await self._history.log(job_pb2.LOG_LEVEL_WARNING, "controller", text)

    def pass_on_warnings(self) -> None:
        """Write the warnings of the run's background tasks while the caller goes on."""
        for warning in self._alerts.take_warnings():
            logger.warning("%s", warning)
            self._history.log_later(job_pb2.LOG_LEVEL_WARNING, "controller", warning)

    def save_summary_later(self, step: int, generated_tokens: int) -> None:
        """Bring the job's summary up to date, and save it with the job's record while the caller goes on."""
        totals = self._clock.totals()
        summary = self._history.summary
        summary["steps"] = step
        summary["wall_s"] = round(time.monotonic() - self._began, 3)
        summary["time_share"] = {name: round(share, 4) for name, share in self._clock.shares().items()}
        if totals["generate"] > 0:
            summary["tokens_per_s"] = round(generated_tokens / totals["generate"], 1)
        self._history.save_later()
