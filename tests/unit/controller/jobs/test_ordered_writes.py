from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from miles.services.controller.jobs.ordered_writes import OrderedWrites


class Disk:
    """Writes names, each once it is let."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.ready = asyncio.Event()

    def slow(self, name: str) -> Callable[[], Awaitable[None]]:
        async def write() -> None:
            await self.ready.wait()
            self.written.append(name)

        return write

    def fast(self, name: str) -> Callable[[], Awaitable[None]]:
        async def write() -> None:
            self.written.append(name)

        return write


async def full() -> None:
    raise OSError("the disk is full")


async def test_writes_keep_the_order_in_which_they_were_asked_for() -> None:
    writes, disk = OrderedWrites(), Disk()
    writes.later(disk.slow("a"))
    writes.later(disk.fast("b"))
    now = asyncio.create_task(writes.now(disk.fast("c")))
    await asyncio.sleep(0)
    assert disk.written == []
    disk.ready.set()
    await now
    assert disk.written == ["a", "b", "c"]


async def test_an_error_of_a_later_write_is_raised_once_where_it_is_asked_for() -> None:
    writes, disk = OrderedWrites(), Disk()
    writes.later(full)
    writes.later(disk.fast("b"))
    await writes.now(disk.fast("c"))
    with pytest.raises(OSError, match="the disk is full"):
        await writes.check()
    await writes.finish()
    assert disk.written == ["b", "c"]


async def test_an_error_of_a_write_that_is_waited_for_is_raised_there_alone() -> None:
    writes = OrderedWrites()
    with pytest.raises(OSError, match="the disk is full"):
        await writes.now(full)
    await writes.finish()


async def test_a_write_that_has_begun_is_made_although_its_caller_is_cancelled() -> None:
    writes, disk = OrderedWrites(), Disk()
    now = asyncio.create_task(writes.now(disk.slow("a")))
    await asyncio.sleep(0)
    now.cancel()
    disk.ready.set()
    with pytest.raises(asyncio.CancelledError):
        await now
    await writes.finish()
    assert disk.written == ["a"]


async def test_whoever_asks_for_more_than_can_be_written_waits() -> None:
    writes, disk = OrderedWrites(), Disk()
    for number in range(20):
        writes.later(disk.slow(str(number)))
    room = asyncio.create_task(writes.check())
    await asyncio.sleep(0)
    assert not room.done()
    disk.ready.set()
    await room
    assert len(disk.written) >= 12


async def test_who_ends_for_another_cause_has_what_failed_in_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    writes, disk = OrderedWrites(), Disk()
    disk.ready.set()
    writes.later(full)
    writes.later(disk.slow("b"))
    await writes.settle()
    assert disk.written == ["b"]
    assert "could not be written: OSError: the disk is full" in caplog.text
    await writes.finish()
