from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from miles.services.controller.clients.calls import WorkerLostError, stream
from miles.services.controller.clients.silence import SilenceWatch

FOREVER_S = 600.0


async def test_a_wait_that_lasts_too_long_ends() -> None:
    with contextlib.closing(SilenceWatch(0.01)) as watch, pytest.raises(TimeoutError), watch:
        await asyncio.sleep(FOREVER_S)


async def test_time_between_waits_does_not_count() -> None:
    with contextlib.closing(SilenceWatch(0.02)) as watch:
        for _ in range(3):
            with watch:
                pass
            await asyncio.sleep(0.05)


async def test_a_watch_ends_a_later_wait_too() -> None:
    with contextlib.closing(SilenceWatch(0.01)) as watch:
        for _ in range(2):
            with pytest.raises(TimeoutError), watch:
                await asyncio.sleep(FOREVER_S)


async def test_a_task_that_is_cancelled_while_it_waits_is_cancelled() -> None:
    waiting = asyncio.Event()

    async def wait() -> None:
        with contextlib.closing(SilenceWatch(FOREVER_S)) as watch, watch:
            waiting.set()
            await asyncio.sleep(FOREVER_S)

    task = asyncio.create_task(wait())
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_stream_that_falls_silent_is_a_lost_worker() -> None:
    async def messages() -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(FOREVER_S)

    received = stream(messages(), "the stream", 0.05)
    assert await anext(received) == 1
    with pytest.raises(WorkerLostError, match=r"the stream: no message for 0\.05 s"):
        await anext(received)
