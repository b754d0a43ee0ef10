from __future__ import annotations

import asyncio

import pytest

from miles.services.rollout.job import telling


async def test_long_work_is_told_of_until_it_is_done() -> None:
    done = asyncio.Event()
    words = telling("building", _wait(done), every_s=0.01)
    assert await anext(words) == "building"
    assert (await anext(words)).startswith("building, for ")
    done.set()
    assert [word async for word in words if not word.startswith("building, for ")] == []


async def test_what_goes_wrong_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        _ = [word async for word in telling("building", _fail())]


@pytest.mark.parametrize("words_heard", [1, 2])
async def test_work_ends_with_whoever_wanted_to_hear_of_it(words_heard: int) -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    words = telling("building", work(), every_s=0.01)
    for _ in range(words_heard):
        await anext(words)
        await asyncio.sleep(0)
    await words.aclose()
    assert ended.is_set()


async def _wait(done: asyncio.Event) -> None:
    await done.wait()


async def _fail() -> None:
    raise ZeroDivisionError
