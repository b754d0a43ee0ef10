"""Commands that share a round trip on a real Redis: each caller gets its own answers and its own errors."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import redis.asyncio
from redis.exceptions import ResponseError

from miles.queue import GroupQueue, RedisServer, connect_async
from miles.queue.pipelining import Call, Pipeliner
from miles.types import SampleGroup


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    connected = await connect_async(redis_url)
    yield connected
    await connected.aclose()


async def test_everybody_gets_the_answers_to_their_own_commands(client: redis.asyncio.Redis, job_id: str) -> None:
    pipeliner = Pipeliner(client)

    async def set_and_get(i: int) -> list[object]:
        key = f"{job_id}:{i}"
        return await pipeliner.run([("SET", key, i, "EX", 60), ("GET", key)], 100_000 if i % 5 == 0 else 10)

    answers = await asyncio.gather(*(set_and_get(i) for i in range(200)))
    assert answers == [[True, str(i).encode()] for i in range(200)]


async def test_an_error_reaches_the_one_whose_command_it_is(client: redis.asyncio.Redis, job_id: str) -> None:
    pipeliner = Pipeliner(client)
    right = [("SET", f"{job_id}:text", "a", "EX", 60)]
    wrong = [("LPUSH", f"{job_id}:text", "b")]
    outcomes = await asyncio.gather(
        pipeliner.run(right, 1), *(pipeliner.run(commands, 1) for commands in (wrong, right)), return_exceptions=True
    )
    assert outcomes[0] == outcomes[2] == [True]
    assert isinstance(outcomes[1], ResponseError)


async def test_commands_that_cannot_be_sent_fail_for_all_who_sent_them_together(
    client: redis.asyncio.Redis, job_id: str
) -> None:
    pipeliner = Pipeliner(client)
    right, wrong = [("GET", job_id)], [("GET", "\ud800")]  # half a character
    first, *together, later = [
        pipeliner.run(right, 1),
        pipeliner.run(wrong, 1),
        pipeliner.run(right, 1),
        pipeliner.run(right, 1),
    ]
    outcomes = await asyncio.gather(*together, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [UnicodeEncodeError, UnicodeEncodeError]
    assert await first == await later == [None]


async def test_calls_of_a_script_are_sent_as_one_and_answered_apart(client: redis.asyncio.Redis, job_id: str) -> None:
    script = """
    local calls = redis.call('INCR', KEYS[1])
    local answers = {}
    for i = 1, #ARGV do
      if ARGV[i] == '3' then return redis.error_reply('three') end
      answers[i] = {tonumber(ARGV[i]), calls}
    end
    return answers
    """
    sha = await client.script_load(script)
    pipeliner = Pipeliner(client)

    async def numbers(*wanted: int) -> list[Any]:
        calls = [pipeliner.run([Call(("EVALSHA", sha, 1, f"{job_id}:calls"), (number,))], 1) for number in wanted]
        return await asyncio.gather(*calls, return_exceptions=True)

    together = [answer[0] for answer in await numbers(0, 1, 2, 4)]
    assert [number for number, _ in together] == [0, 1, 2, 4]
    assert await client.getdel(f"{job_id}:calls") < b"4"
    zero, three, five = await numbers(0, 3, 5)
    assert (zero[0][0], five[0][0]) == (0, 5)
    assert isinstance(three, ResponseError)
    await client.delete(f"{job_id}:calls")


async def test_one_who_does_not_wait_any_more_takes_nothing_from_the_others(
    client: redis.asyncio.Redis, job_id: str
) -> None:
    pipeliner = Pipeliner(client)
    tasks = [asyncio.create_task(pipeliner.run([("INCR", f"{job_id}:count")], 1)) for _ in range(10)]
    await asyncio.sleep(0)
    tasks[3].cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(outcomes[3], asyncio.CancelledError)
    answered = [outcome[0] for i, outcome in enumerate(outcomes) if i != 3]
    assert len(answered) == len(set(answered)) == 9
    await client.delete(f"{job_id}:count")


async def test_puts_that_travel_together_survive_a_server_that_forgets_its_scripts(
    client: redis.asyncio.Redis, job_id: str, make_group: Callable[..., SampleGroup]
) -> None:
    queue = GroupQueue(client, job_id, inline_limit=4096)
    await client.script_flush()
    groups = [make_group(i, response_tokens=5 + 2000 * (i % 2)) for i in range(8)]
    entries = await asyncio.gather(*(queue.put(group, attempt=1) for group in groups))
    collected = await queue.collect(range(8), 5)
    assert [collected[i] for i in range(8)] == list(zip(entries, groups, strict=True))
    await queue.drop_job()


async def test_puts_under_way_when_redis_is_killed_are_queued_once(
    tmp_path: pathlib.Path, job_id: str, make_group: Callable[..., SampleGroup]
) -> None:
    # By default a disk that is slower than a flush a second would cost what was answered last.
    server = RedisServer(tmp_path, port=0, appendfsync="always").start()
    client = await connect_async(server.url)
    queue = GroupQueue(client, job_id, inline_limit=20_000)
    groups = [make_group(i, response_tokens=100 + 4000 * (i % 3 == 0)) for i in range(300)]
    putting = [asyncio.ensure_future(queue.put(group, attempt=1)) for group in groups]
    await putting[-250]
    server.kill()
    await asyncio.to_thread(server.start)
    await asyncio.gather(*putting)
    assert [entry.group_id for entry in await queue.outstanding()] == list(range(300))
    collected = await queue.collect(range(300), 30)
    assert [group for _, group in collected.values()] == groups
    assert await client.xlen(f"miles:{job_id}:groups") == 300
    await client.aclose()
    server.stop()
