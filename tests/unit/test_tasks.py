"""Ending asyncio tasks."""

from __future__ import annotations

import asyncio
from typing import Any

from miles.tasks import cancel


async def test_cancelled_tasks_have_ended_and_their_errors_are_not_reported() -> None:
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

    async def fail() -> None:
        raise ValueError("of a task that nobody waits for")

    async def fail_late() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0)
            await fail()

    ended, late, waiting = (asyncio.create_task(work) for work in (fail(), fail_late(), asyncio.sleep(3600)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert ended.done()
    await cancel(ended)
    await cancel(late, waiting)
    assert late.done()
    assert waiting.cancelled()
    del ended, late
    await asyncio.sleep(0)
    assert reported == []


async def test_the_callbacks_of_a_task_that_has_just_ended_have_run() -> None:
    told: list[str] = []
    ended = asyncio.create_task(asyncio.sleep(0))
    ended.add_done_callback(lambda _: told.append("ended"))
    while not ended.done():  # noqa: ASYNC110 (the very step after which its callbacks are due)
        await asyncio.sleep(0)
    assert told == []
    await cancel(ended)
    assert told == ["ended"]
