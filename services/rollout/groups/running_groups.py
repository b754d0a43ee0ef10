"""The groups that a job is running on this worker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from miles.queue import Holder
from miles.services.rollout.groups.group_run import GroupRun, GroupTools
from miles.services.rollout.groups.messages import Failed, GroupLease, Outcome, Purpose

log = logging.getLogger(__name__)

STORE_DEADLINE_S = 60.0
"""How long preempted groups may take to store their responses."""

Deliver = Callable[[GroupLease, Outcome], None]


class RunningGroups:
    """Starts a run for each group lease and preempts runs. `on_change` is called when a run begins or ends."""

    def __init__(self, tools: GroupTools, worker_id: str, on_change: Callable[[], None]) -> None:
        self._tools = tools
        self._worker_id = worker_id
        self._on_change = on_change
        self._runs: dict[tuple[Purpose, int], tuple[GroupRun, asyncio.Task[None]]] = {}

    @property
    def sizes(self) -> list[int]:
        """Samples of each group that runs."""
        return [len(run.lease.group.samples) for run, _ in self._runs.values()]

    def start(self, lease: GroupLease, deliver: Deliver, lease_number: int) -> None:
        """Begin a group; `deliver` gets its outcome, unless the run is cancelled.

        `lease_number` is that of the worker lease under which the group was handed out. If the same group still runs,
        that run is preempted first.
        """
        key = (lease.purpose, lease.group_id)
        before = self._runs.get(key)
        run = GroupRun(lease, self._tools, Holder(self._worker_id, lease_number))

        async def run_after_earlier() -> None:
            if before is not None:
                before[0].preempt()
                await asyncio.wait([before[1]])
            try:
                outcome = await run.run()
            except Exception as error:  # nobody would ever hear of the group again
                log.exception("group %d ended with an error that is a bug", lease.group_id)
                outcome = Failed(f"{type(error).__name__}: {error}")
            deliver(lease, outcome)

        task = asyncio.create_task(run_after_earlier(), name=f"group {lease.group_id} of job {self._tools.job_id}")
        task.add_done_callback(lambda _: self._remove(key, run))
        task.add_done_callback(_log_bug)
        self._runs[key] = (run, task)
        self._on_change()

    def preempt(self, group_id: int, attempt: int, purpose: Purpose | None = None) -> None:
        """Preempt one group, if that attempt of it runs; without a purpose, for either purpose."""
        for run, _ in self._runs.values():
            lease = run.lease
            if (lease.group_id, lease.attempt) == (group_id, attempt) and purpose in (None, lease.purpose):
                run.preempt()

    def preempt_all(self) -> None:
        """Preempt every group."""
        for run, _ in self._runs.values():
            run.preempt()

    async def preempt_and_wait(self, deadline_s: float = STORE_DEADLINE_S) -> None:
        """Preempt every group and wait until each has stored its responses."""
        self.preempt_all()
        tasks = [task for _, task in self._runs.values()]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=deadline_s)
            for task in late:
                log.warning("%s did not end within %.0f s; its responses are lost", task.get_name(), deadline_s)
                task.cancel()

    def _remove(self, key: tuple[Purpose, int], run: GroupRun) -> None:
        if self._runs.get(key, (None,))[0] is run:
            del self._runs[key]
            self._on_change()


def _log_bug(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s ended with an error that is a bug", task.get_name(), exc_info=error)
