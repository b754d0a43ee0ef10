from __future__ import annotations

import asyncio
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import redis.asyncio
from redis.exceptions import ResponseError

from miles.queue import GroupQueue, Holder, JobKeys, RedisServer, ResponseStore, connect_async
from miles.queue.response_store import MAX_RESPONSE_TOKENS, RESPONSE_TTL_S


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    connected = await connect_async(redis_url)
    yield connected
    await connected.aclose()


def tokens(*ids: int) -> npt.NDArray[np.int32]:
    return np.array(ids, np.int32)


def as_lists(responses: Sequence[npt.NDArray[np.int32]]) -> list[list[int]]:
    assert all(response.dtype == np.int32 for response in responses)
    return [response.tolist() for response in responses]


async def keys_of(client: redis.asyncio.Redis, job_id: str) -> set[str]:
    prefix = JobKeys(job_id).prefix
    return {key.decode().removeprefix(prefix) async for key in client.scan_iter(f"{prefix}*")}


async def test_every_engine_reads_the_newest_responses_to_a_prompt(client: redis.asyncio.Redis, job_id: str) -> None:
    one, other = (ResponseStore(client, job_id, per_prompt=3) for _ in range(2))
    prompt = tokens(7, 8, 9)
    assert await one.newest(prompt) == []
    await one.add(prompt, [tokens(1), tokens(2, 2)])
    await other.add(prompt, [tokens(3, 3, 3), tokens(), tokens(4)])
    for store in (one, other):
        assert as_lists(await store.newest(prompt)) == [[4], [3, 3, 3], [2, 2]]
    assert await one.newest(tokens(7, 8)) == []
    assert await ResponseStore(client, f"{job_id}-2", per_prompt=3).newest(prompt) == []


async def test_a_response_that_is_kept_already_becomes_the_newest(client: redis.asyncio.Redis, job_id: str) -> None:
    store = ResponseStore(client, job_id, per_prompt=3)
    prompt = tokens(7)
    await store.add(prompt, [tokens(1), tokens(2), tokens(3)])
    await store.add(prompt, [tokens(1), tokens(1)])
    assert as_lists(await store.newest(prompt)) == [[1], [3], [2]]
    await store.add(prompt, [tokens(5), tokens(6), tokens(5), tokens(6), tokens(8)])
    assert as_lists(await store.newest(prompt)) == [[8], [6], [5]]


async def test_fewer_are_kept_once_fewer_are_wanted(client: redis.asyncio.Redis, job_id: str) -> None:
    prompt = tokens(7)
    await ResponseStore(client, job_id, per_prompt=4).add(prompt, [tokens(i) for i in range(4)])
    store = ResponseStore(client, job_id, per_prompt=2)
    assert as_lists(await store.newest(prompt)) == [[3], [2]]
    await store.add(prompt, [tokens(4)])
    assert as_lists(await ResponseStore(client, job_id, per_prompt=4).newest(prompt)) == [[4], [3]]


async def test_prompts_answered_longest_ago_go_first_when_there_are_too_many_bytes(
    client: redis.asyncio.Redis, job_id: str
) -> None:
    per_prompt = 4 * 100 + 256
    store = ResponseStore(client, job_id, per_prompt=1, max_bytes=3 * per_prompt)
    for i in range(3):
        await store.add(tokens(i), [tokens(*range(100))])
    await store.add(tokens(0), [tokens(*range(1, 101))])
    await store.add(tokens(3), [tokens(*range(100))])
    kept = [bool(await store.newest(tokens(i))) for i in range(4)]
    assert kept == [True, False, True, True]
    sizes = await client.hgetall(JobKeys(job_id).response_sizes)
    assert int(sizes.pop(b"")) == sum(map(int, sizes.values())) == 3 * per_prompt
    await store.add(tokens(5), [tokens(*range(1000))])
    assert await keys_of(client, job_id) == {"response_sizes"}, "what does not fit alone is not kept"
    assert await client.hgetall(JobKeys(job_id).response_sizes) == {b"": b"0"}


async def test_old_responses_expire_and_are_not_counted_any_more(client: redis.asyncio.Redis, job_id: str) -> None:
    store = ResponseStore(client, job_id, per_prompt=1)
    await store.add(tokens(1), [tokens(1)])
    keys = JobKeys(job_id)
    for name in await keys_of(client, job_id):
        assert 0 < await client.ttl(f"{keys.prefix}{name}") <= RESPONSE_TTL_S
    [(name, _)] = await client.zrange(keys.response_ages, 0, -1, withscores=True)
    await client.zadd(keys.response_ages, {name: 1.0})
    await client.unlink(keys.responses(name.decode()))
    await store.add(tokens(2), [tokens(2)])
    assert await client.zcard(keys.response_ages) == 1
    assert int(await client.hget(keys.response_sizes, "")) == 4 + 256


async def test_of_a_very_long_response_the_beginning_is_kept(client: redis.asyncio.Redis, job_id: str) -> None:
    store = ResponseStore(client, job_id, per_prompt=1)
    await store.add(tokens(1), [np.arange(MAX_RESPONSE_TOKENS + 5, dtype=np.int32)])
    [kept] = await store.newest(tokens(1))
    assert kept.tolist() == list(range(MAX_RESPONSE_TOKENS))


async def test_responses_go_with_their_job_and_do_not_come_back(client: redis.asyncio.Redis, job_id: str) -> None:
    store = ResponseStore(client, job_id, per_prompt=2)
    await store.add(tokens(1), [tokens(1)], Holder("rollout-0", 5))
    await GroupQueue(client, job_id).drop_job()
    assert await store.newest(tokens(1)) == []
    await store.add(tokens(1), [tokens(1)], Holder("rollout-0", 5))
    assert await keys_of(client, job_id) == {"fences"}


async def test_a_server_with_little_memory_keeps_its_room_for_groups(tmp_path: pathlib.Path, job_id: str) -> None:
    with RedisServer(tmp_path) as server:
        client = await connect_async(server.url)
        used = int((await client.info("memory"))["used_memory"])
        await client.config_set("maxmemory", used + (64 << 20))
        store = ResponseStore(client, job_id, per_prompt=1)
        await store.fit_server()
        for i in range(100):
            await store.add(tokens(i), [np.full(MAX_RESPONSE_TOKENS, i, np.int32)])
        total = int(await client.hget(JobKeys(job_id).response_sizes, ""))
        assert (4 << 20) < total <= (used + (64 << 20)) // 8
        await client.config_set("maxmemory", 1)
        before = await keys_of(client, job_id)
        with pytest.raises(ResponseError, match="OOM"):
            await store.add(tokens(1000), [tokens(1)])
        assert await keys_of(client, job_id) == before
        await client.aclose()


_WRITER = """
import asyncio, sys
import numpy as np
from miles.queue import ResponseStore, connect_async

async def write():
    client = await connect_async(sys.argv[1])
    store = ResponseStore(client, sys.argv[2], per_prompt=2, max_bytes=20_000)
    for i in range(1_000_000):
        await store.add(np.array([i % 50], np.int32), [np.full(100, i, np.int32)])
        if i == 100:
            print("writing", flush=True)

asyncio.run(write())
"""


async def test_a_writer_that_is_killed_leaves_whole_responses_and_a_right_count(
    client: redis.asyncio.Redis, redis_url: str, job_id: str
) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [sys.executable, "-c", _WRITER, redis_url, job_id]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) as writer:
        assert writer.stdout is not None
        assert await asyncio.to_thread(writer.stdout.readline) == "writing\n"
        writer.send_signal(signal.SIGKILL)
    keys = JobKeys(job_id)
    sizes = await client.hgetall(keys.response_sizes)
    total = int(sizes.pop(b""))
    assert total == sum(map(int, sizes.values())) <= 20_000
    assert {name for name, _ in await client.zrange(keys.response_ages, 0, -1, withscores=True)} == set(sizes)
    store = ResponseStore(client, job_id, per_prompt=2)
    found = [response for i in range(50) for response in await store.newest(tokens(i))]
    assert found
    assert all(len(response) == 100 and len(set(response.tolist())) == 1 for response in found)
