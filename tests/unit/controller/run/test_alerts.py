"""What background tasks of a run report to its loop."""

from __future__ import annotations

import asyncio

import pytest

from miles.change_signal import ChangeSignal
from miles.services.controller.run.alerts import RunAlerts


def test_warnings_are_taken_once() -> None:
    alerts = RunAlerts(ChangeSignal())
    alerts.warn("slow")
    assert (alerts.take_warnings(), alerts.take_warnings()) == (["slow"], [])


async def test_a_watched_task_that_fails_wakes_the_loop_and_ends_the_job() -> None:
    changed = ChangeSignal()
    alerts = RunAlerts(changed)
    alerts.check()

    async def work() -> None:
        raise KeyError("x")

    waiting = asyncio.create_task(changed.wait(60))
    await asyncio.sleep(0)
    alerts.watch(asyncio.create_task(work()))
    await waiting
    with pytest.raises(KeyError):
        alerts.check()


async def test_a_watched_task_may_be_cancelled() -> None:
    alerts = RunAlerts(ChangeSignal())
    task = asyncio.create_task(asyncio.sleep(60))
    alerts.watch(task)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    alerts.check()
