"""A Redis belongs to one controller at a time."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import redis.asyncio

from miles.queue import RedisInUse, RedisLease, RedisServer, connect_async
from miles.queue import redis_lease as module
from miles.queue.redis_lease import KEY, RedisOwner


@pytest_asyncio.fixture
async def client(tmp_path: pathlib.Path) -> AsyncIterator[redis.asyncio.Redis]:
    with RedisServer(tmp_path / "redis") as server:
        connected = await connect_async(server.url)
        yield connected
        await connected.aclose()


async def test_a_second_controller_is_refused_with_who_holds_it_and_since_when(client: redis.asyncio.Redis) -> None:
    first = await RedisLease.acquire(client)
    with pytest.raises(RedisInUse, match=rf"process id {os.getpid()} on \S+, since 20\d\d-"):
        await RedisLease.acquire(client, wait_s=0.5)
    await first.release()
    second = await RedisLease.acquire(client)
    await first.release()  # not its own any more
    assert await client.exists(KEY)
    await second.release()


async def test_a_killed_controllers_lease_is_taken_over_at_once(client: redis.asyncio.Redis) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = module._started(process.pid)
        assert started is not None
        owner = dataclasses.replace(RedisOwner.this_process(), pid=process.pid, started=started, unique="x")
        assert not owner.is_dead
        process.kill()
        process.wait()
    assert owner.is_dead
    await client.set(KEY, json.dumps(dataclasses.asdict(owner)), px=3_600_000)
    await (await RedisLease.acquire(client)).release()


async def test_a_lease_of_another_machine_is_taken_over_when_it_has_run_out(client: redis.asyncio.Redis) -> None:
    owner = dataclasses.replace(RedisOwner.this_process(), machine="elsewhere", unique="x")
    await client.set(KEY, json.dumps(dataclasses.asdict(owner)), px=300)
    await (await RedisLease.acquire(client)).release()


async def test_a_controller_that_lost_its_lease_is_told_who_has_it(client: redis.asyncio.Redis) -> None:
    lease = await RedisLease.acquire(client)
    keeping = asyncio.create_task(lease.keep())
    other = dataclasses.replace(RedisOwner.this_process(), host="thief", unique="x")
    await client.set(KEY, json.dumps(dataclasses.asdict(other)))
    with pytest.raises(RedisInUse, match=r"on thief, since .* took it from this one"):
        await keeping


async def test_a_lease_that_ran_out_while_the_process_was_suspended_is_renewed(client: redis.asyncio.Redis) -> None:
    lease = await RedisLease.acquire(client)
    await client.delete(KEY)
    keeping = asyncio.create_task(lease.keep())
    async with asyncio.timeout(60):
        while not await client.exists(KEY):  # noqa: ASYNC110  (another process's key)
            await asyncio.sleep(0.05)
    keeping.cancel()


async def test_it_is_given_back_however_its_block_ends(client: redis.asyncio.Redis) -> None:
    async def fail() -> None:
        async with (await RedisLease.acquire(client)).kept():
            assert await client.exists(KEY)
            raise OSError("the port is taken")

    with pytest.raises(OSError, match="the port is taken"):
        await fail()
    assert not await client.exists(KEY)


async def test_it_is_kept_on_a_full_redis(client: redis.asyncio.Redis) -> None:
    lease = await RedisLease.acquire(client)
    await client.set("filler", b"x" * (8 << 20))
    await client.config_set("maxmemory", 4 << 20)
    assert await lease._try("") == ""


def test_a_pid_that_another_process_has_got_is_not_the_owner() -> None:
    mine = RedisOwner.this_process()
    assert not mine.is_dead
    assert dataclasses.replace(mine, started=mine.started + 1).is_dead
    assert not dataclasses.replace(mine, started=mine.started + 1, machine="elsewhere").is_dead
