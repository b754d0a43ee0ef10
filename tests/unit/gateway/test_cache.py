"""Answers that many ask for are asked for once."""

from __future__ import annotations

import asyncio

import pytest

from miles.gateway.cache import AnswerCache


async def test_callers_at_the_same_time_share_one_answer() -> None:
    cache: AnswerCache[int] = AnswerCache(keep_s=60)
    made = 0

    async def make() -> int:
        nonlocal made
        made += 1
        await asyncio.sleep(0.01)
        return made

    assert await asyncio.gather(*(cache.get("a", make) for _ in range(50))) == [1] * 50
    assert await cache.get("a", make) == 1
    assert await cache.get("b", make) == 2


async def test_an_old_answer_is_made_anew() -> None:
    cache: AnswerCache[int] = AnswerCache(keep_s=0)
    answers = iter(range(9))

    async def make() -> int:
        return next(answers)

    assert [await cache.get("a", make) for _ in range(3)] == [0, 1, 2]


async def test_errors_reach_all_that_wait_and_are_not_kept() -> None:
    cache: AnswerCache[int] = AnswerCache(keep_s=60)

    async def fail() -> int:
        await asyncio.sleep(0)
        raise ValueError("no")

    async def succeed() -> int:
        return 1

    results = await asyncio.gather(*(cache.get("a", fail) for _ in range(3)), return_exceptions=True)
    assert [str(result) for result in results] == ["no"] * 3
    assert await cache.get("a", succeed) == 1


async def test_a_caller_that_leaves_does_not_take_the_answer_from_others() -> None:
    cache: AnswerCache[int] = AnswerCache(keep_s=60)
    release = asyncio.Event()

    async def make() -> int:
        await release.wait()
        return 1

    first = asyncio.create_task(cache.get("a", make))
    second = asyncio.create_task(cache.get("a", make))
    await asyncio.sleep(0)
    first.cancel()
    release.set()
    assert await second == 1
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_what_was_forgotten_is_not_given_to_later_callers() -> None:
    cache: AnswerCache[str] = AnswerCache(keep_s=60)
    release = asyncio.Event()

    async def old() -> str:
        await release.wait()
        return "old"

    async def new() -> str:
        return "new"

    early = asyncio.create_task(cache.get("a", old))
    await asyncio.sleep(0)
    cache.forget("a")
    assert await cache.get("a", new) == "new"
    release.set()
    assert await early == "old"
    assert await cache.get("a", old) == "new"


async def test_the_cache_is_bounded() -> None:
    cache: AnswerCache[int] = AnswerCache(keep_s=60, size=3)

    async def make() -> int:
        return 1

    for key in range(10):
        await cache.get(key, make)
    assert len(cache._kept) == 3


async def test_an_ageing_answer_is_given_while_the_next_is_made() -> None:
    cache: AnswerCache[int] = AnswerCache(keep_s=60, renew_s=40)
    release = asyncio.Event()
    made = 0

    async def make() -> int:
        nonlocal made
        made += 1
        number = made
        if number == 2:
            raise ValueError("away for a moment")
        if number > 2:
            await release.wait()
        return number

    def age(seconds: float) -> None:
        cache._kept["a"].made_s -= seconds

    assert await cache.get("a", make) == 1
    age(50)
    assert [await cache.get("a", make) for _ in range(3)] == [1, 1, 1]
    await asyncio.sleep(0.01)
    assert made == 2
    assert await cache.get("a", make) == 1  # the failure was nobody's; it is tried again
    await asyncio.sleep(0.01)
    assert made == 3
    age(20)  # too old by now: the answer in the making is waited for
    late = asyncio.create_task(cache.get("a", make))
    await asyncio.sleep(0.01)
    assert not late.done()
    release.set()
    assert await late == 3
    assert await cache.get("a", make) == made == 3


async def test_an_answer_in_the_making_is_not_given_to_those_who_come_after_forget() -> None:
    cache: AnswerCache[str] = AnswerCache(keep_s=60, renew_s=40)
    release = asyncio.Event()

    async def old() -> str:
        await release.wait()
        return "old"

    async def first() -> str:
        return "first"

    assert await cache.get("a", first) == "first"
    cache._kept["a"].made_s -= 50
    assert await cache.get("a", old) == "first"
    cache.forget("a")
    release.set()
    await asyncio.sleep(0.01)
    assert await cache.get("a", first) == "first"
