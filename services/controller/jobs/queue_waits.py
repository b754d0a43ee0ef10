"""What jobs in the queue wait for, and when their histories say so. Pure: the caller brings the time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from miles.services.controller.status.waits import Wait, WaitLog

_LACK_S = 3.0
"""Workers attach within seconds where services start together; a lack that lasts longer is told."""


def waits_in_queue(lacks: str, ahead: int, running: str) -> list[Wait]:
    """Return what a queued job waits for: workers that it lacks, and jobs before it (`running`: the one that runs)."""
    waits = []
    if lacks:
        waits.append(Wait(lacks, ending="no bound: start what is missing, or cancel the job", patience_s=_LACK_S))
    if ahead:
        detail = f"{running} runs now" if running else ""
        ending = "no bound: jobs run one at a time, in order; stop or cancel those before it"
        waits.append(Wait(f"{ahead} job{'s' * (ahead > 1)} ahead of it", detail, ending=ending))
    return waits


class QueueWaits:
    """Keeps the waits of every queued job."""

    def __init__(self) -> None:
        self._logs: dict[str, WaitLog] = {}

    def note(self, waits: Mapping[str, Sequence[Wait]], now_s: float) -> Iterator[tuple[str, str]]:
        """Note what each queued job waits for, by its id; yield job ids with what to write to their histories."""
        self._logs = {job_id: self._logs.get(job_id, WaitLog()) for job_id in waits}
        for job_id, log in self._logs.items():
            log.note(waits[job_id], now_s)
            for line in log.news(now_s):
                yield job_id, line

    def of(self, job_id: str) -> Sequence[Wait]:
        """Return what a job waits for; nothing for one that is not in the queue."""
        return self._logs[job_id].waits if job_id in self._logs else ()
