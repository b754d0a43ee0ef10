"""Writes what a job leaves behind: its record, events, metrics and summary."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from miles.regular_files import replace_file
from miles.rpc.gen import job_pb2
from miles.services.controller.jobs.context import JobContext
from miles.services.controller.jobs.ordered_writes import OrderedWrites, Write
from miles.services.controller.jobs.records import ENDED
from miles.services.controller.jobs.store import JobStore
from miles.services.controller.status import timeline
from miles.services.controller.status.timeline import TimelineWriter
from miles.telemetry import MetricsWriter, read_metrics
from miles.telemetry.redaction import redact
from miles.telemetry.trackers.background import BackgroundTracker
from miles.telemetry.trackers.choice import open_trackers

logger = logging.getLogger(__name__)

SUMMARY_NAME = "summary.json"
METRICS_NAME = "metrics.jsonl"
LAST_EVALUATED = "last_evaluated_version"
"""Key in a job's summary: the newest version whose evaluation is recorded."""


class JobHistory:
    """Writes one job's record and events to Redis, metrics and summary to the run folder, in the order of the calls.

    What is written `later` takes no time of the caller's; `check` raises its errors, and `finish` waits for it too.
    """

    def __init__(self, store: JobStore, job: job_pb2.Job, context: JobContext) -> None:
        self.job = job
        self._store = store
        self._context = context
        self._writer: MetricsWriter | None = None
        self._trackers: list[BackgroundTracker] | None = None
        self._writes = OrderedWrites()
        self.summary: dict[str, Any] = json.loads(job.summary_json) if job.summary_json else {}
        self.timeline = TimelineWriter(context.run_dir / timeline.NAME)

    def open_metrics(self, first_step: int) -> None:
        """Begin to write metrics at a step; discards what an interrupted run wrote of it and of later ones.

        The evaluation of the version that the step begins with stays: it is not repeated.
        """
        if self._writer is not None:
            self._writer.close()
        self._writer = MetricsWriter(
            self._context.run_dir / METRICS_NAME,
            first_step,
            keep_evaluation=self.summary.get(LAST_EVALUATED, -1) >= first_step,
        )
        if self._trackers is None:
            context = self._context
            self._trackers = open_trackers(context.config, context.job_id, context.run_dir, self._warn_from_thread())

    def recorded_steps(self, name: str) -> set[int]:
        """Return the steps for which the metrics file has a metric."""
        lines = read_metrics(self._context.run_dir / METRICS_NAME)
        return {line["step"] for line in lines if line.get(name) is not None}

    async def check(self) -> None:
        """Raise the first error of what was to be written later; waits only while much is left to be written."""
        await self._writes.check()

    async def finish(self) -> None:
        """Return once everything is written; raise the first error of what was to be written later."""
        await self._writes.finish()

    async def settle(self) -> None:
        """Return once everything is written or has failed; errors are in the log alone."""
        await self._writes.settle()

    async def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics of a step."""
        await self._writes.now(self._metrics(step, values))

    def metrics_later(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics of a step while the caller goes on."""
        self._writes.later(self._metrics(step, values))

    def _metrics(self, step: int, values: Mapping[str, float]) -> Write:
        writer = self._writer
        assert writer is not None
        event = job_pb2.JobEvent(job_id=self.job.job_id, metrics=job_pb2.Metrics(step=step, values=values))

        async def write() -> None:
            await asyncio.to_thread(writer.write, step, values)
            for tracker in self._trackers or ():
                tracker.write(step, values)
            await self._store.add_event(event)

        return write

    async def log(self, level: job_pb2.LogLevel.ValueType, source: str, text: str) -> None:
        """Record a line for people."""
        await self._writes.now(self._log(level, source, text))

    def log_later(self, level: job_pb2.LogLevel.ValueType, source: str, text: str) -> None:
        """Record a line for people while the caller goes on."""
        self._writes.later(self._log(level, source, text))

    def _log(self, level: job_pb2.LogLevel.ValueType, source: str, text: str) -> Write:
        line = job_pb2.LogLine(level=level, source=source, text=redact(text))
        return lambda: self._store.add_event(job_pb2.JobEvent(job_id=self.job.job_id, log=line))

    async def state(self, state: job_pb2.JobState.ValueType, reason: str) -> None:
        """Move the job to a state; an ended job also gets its end time, error and summary file."""
        if state == self.job.state:
            return
        now = time.time_ns()
        self.job.state = state
        if state == job_pb2.JOB_STATE_RUNNING and not self.job.started_unix_ns:
            self.job.started_unix_ns = now
        self.job.ended_unix_ns = now if state in ENDED else 0
        self.job.error = redact(reason) if state == job_pb2.JOB_STATE_FAILED else ""
        changed = job_pb2.JobStateChanged(state=state, reason=redact(reason))
        await self.save(job_pb2.JobEvent(job_id=self.job.job_id, state_changed=changed))

    async def save(self, event: job_pb2.JobEvent | None = None) -> None:
        """Write the record to Redis, with an event that belongs to it, and then the summary to the run folder.

        Raises OSError when the run folder cannot be written; the record is stored by then.
        """
        await self._writes.now(self._save(event))

    def save_later(self) -> None:
        """Write the record and the summary as they are now, while the caller goes on."""
        self._writes.later(self._save(None))

    def _save(self, event: job_pb2.JobEvent | None) -> Write:
        self.job.summary_json = json.dumps(self.summary)
        record = job_pb2.Job()
        record.CopyFrom(self.job)
        summary = json.dumps(self.summary, indent=2) + "\n"

        async def write() -> None:
            await self._store.put(record, event)
            await asyncio.to_thread(
                replace_file, self._context.run_dir / SUMMARY_NAME, summary
            )  # it waits for the disk

        return write

    def _warn_from_thread(self) -> Callable[[str], None]:
        loop = asyncio.get_running_loop()

        def warn(text: str) -> None:
            logger.warning("%s", text)
            loop.call_soon_threadsafe(self.log_later, job_pb2.LOG_LEVEL_WARNING, "controller", text)

        return warn

    async def close_trackers(self) -> None:
        """Wait, within limits, until trackers have sent what they have."""
        trackers, self._trackers = self._trackers or [], None
        await asyncio.gather(*(asyncio.to_thread(tracker.close) for tracker in trackers))

    def close(self) -> None:
        """Close the files of metrics and activity."""
        self.timeline.close()
        with contextlib.suppress(ValueError):
            if self._writer is not None:
                self._writer.close()
