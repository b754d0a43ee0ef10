from __future__ import annotations

import asyncio
import pathlib
from collections.abc import AsyncIterator, Callable

import pytest
import redis.asyncio
from redis.exceptions import OutOfMemoryError

from miles.queue import (
    Fenced,
    GroupQueue,
    Holder,
    JobKeys,
    MissingGroups,
    QueueFull,
    RedisServer,
    UnreadableGroups,
    connect_async,
)
from miles.queue.blobs import PIECE_BYTES
from miles.types import SampleGroup

MakeGroup = Callable[..., SampleGroup]


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    connected = await connect_async(redis_url)
    yield connected
    await connected.aclose()


@pytest.fixture
def queue(client: redis.asyncio.Redis, job_id: str) -> GroupQueue:
    return GroupQueue(client, job_id, inline_limit=4096)


async def test_groups_come_back_equal_whether_in_the_entry_or_in_a_blob(
    queue: GroupQueue, make_group: MakeGroup
) -> None:
    small, big = make_group(1), make_group(0, response_tokens=200, experts=(4, 2))
    ids = {group.group_id: await queue.put(group, attempt=1) for group in (small, big)}
    collected = await queue.collect([1, 0], 5)
    assert list(collected) == [1, 0]
    assert collected == {1: (ids[1], small), 0: (ids[0], big)}


async def test_a_second_put_returns_the_first_entry(
    queue: GroupQueue, client: redis.asyncio.Redis, job_id: str, make_group: MakeGroup
) -> None:
    for group in (make_group(1), make_group(2, response_tokens=2000)):
        first = await queue.put(group, attempt=1)
        assert await queue.put(group, attempt=2) == first
    assert await client.xlen(JobKeys(job_id).groups) == 2
    assert await client.hvals(JobKeys(job_id).blob_refs) == [b"1"]


async def test_concurrent_puts_of_one_group_make_one_entry(queue: GroupQueue, make_group: MakeGroup) -> None:
    group = make_group(5, response_tokens=2000)
    entries = await asyncio.gather(*(queue.put(group, attempt=i) for i in range(8)))
    assert len(set(entries)) == 1
    assert len(await queue.outstanding()) == 1


async def test_collect_waits_for_the_last_group_and_keeps_the_others(queue: GroupQueue, make_group: MakeGroup) -> None:
    await queue.put(make_group(7), attempt=1)
    waiting = asyncio.ensure_future(queue.collect([3, 4], 10))
    await queue.put(make_group(4), attempt=1)
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await queue.put(make_group(3), attempt=1)
    assert list(await waiting) == [3, 4]
    assert (await queue.collect([7], 5))[7][1] == make_group(7)


async def test_a_group_can_be_collected_again_until_it_is_acknowledged(
    queue: GroupQueue, make_group: MakeGroup
) -> None:
    await queue.put(make_group(1, response_tokens=2000), attempt=1)
    assert await queue.collect([1], 5) == await queue.collect([1], 5)
    assert await queue.acknowledge([1]) == 1
    with pytest.raises(MissingGroups):
        await queue.collect([1], 0.1)


async def test_missing_groups_are_named(queue: GroupQueue, make_group: MakeGroup) -> None:
    await queue.put(make_group(1), attempt=1)
    with pytest.raises(MissingGroups, match=r"groups 2, 9 of job .* \(1 of 3 did\)") as error:
        await queue.collect([1, 2, 9], 0.2)
    assert error.value.group_ids == [2, 9]
    assert isinstance(error.value, TimeoutError)
    assert (await queue.collect([1], 5))[1][1] == make_group(1)


async def test_acknowledging_leaves_nothing_behind(
    queue: GroupQueue, client: redis.asyncio.Redis, job_id: str, make_group: MakeGroup
) -> None:
    entries = [await queue.put(make_group(i, response_tokens=5 + 2000 * (i % 2)), attempt=1) for i in range(6)]
    await queue.collect(range(6), 5)
    assert await queue.acknowledge([0, 1, entries[2], entries[3]]) == 4
    assert await queue.acknowledge([0, entries[2]]) == 0
    assert [entry.group_id for entry in await queue.outstanding()] == [4, 5]
    assert await queue.acknowledge([4, entries[5]]) == 2
    keys = JobKeys(job_id)
    pending = await client.xpending(keys.groups, "trainer")
    assert pending["pending"] == 0
    assert [key async for key in client.scan_iter(f"{keys.prefix}*")] == [keys.groups.encode()]
    assert await client.xlen(keys.groups) == 0


async def test_outstanding_describes_entries_without_reading_them(queue: GroupQueue, make_group: MakeGroup) -> None:
    big = make_group(10, response_tokens=2000, version=4)
    await queue.put(big, attempt=3)
    await queue.put(make_group(2), attempt=1, oldest_version=9)
    first, second = await queue.outstanding()
    assert (first.group_id, first.attempt, first.oldest_version) == (2, 1, 9)
    assert (second.group_id, second.attempt, second.oldest_version) == (10, 3, 4)
    assert second.nbytes > 2000 * 2 * 8 > first.nbytes


async def test_one_group_can_be_looked_up_without_consuming_it(queue: GroupQueue, make_group: MakeGroup) -> None:
    group = make_group(1, response_tokens=2000)
    assert await queue.find(1) is None
    entry_id = await queue.put(group, attempt=1)
    assert await queue.find(1) == (entry_id, group)
    assert await queue.collect([1], 5) == {1: (entry_id, group)}


async def test_hundreds_of_groups_can_be_put_at_once(queue: GroupQueue, make_group: MakeGroup) -> None:
    await asyncio.gather(*(queue.put(make_group(i), attempt=1) for i in range(300)))
    assert len(await queue.collect(range(300), 20)) == 300


async def test_a_restarted_trainer_gets_its_own_and_a_dead_ones_entries(
    client: redis.asyncio.Redis, job_id: str, make_group: MakeGroup
) -> None:
    writer = GroupQueue(client, job_id)
    for i in range(4):
        await writer.put(make_group(i), attempt=1)
    await GroupQueue(client, job_id, consumer="gone").collect([0, 1, 2, 3], 5)
    patient = GroupQueue(client, job_id, consumer="next", dead_after_s=60)
    with pytest.raises(MissingGroups):
        await patient.collect([0], 0.2)
    next_one = GroupQueue(client, job_id, consumer="next", dead_after_s=0)
    assert list(await next_one.collect([0, 1, 2, 3], 5)) == [0, 1, 2, 3]
    same_name = GroupQueue(client, job_id, consumer="next", dead_after_s=60)
    assert (await same_name.collect([2], 5))[2][1] == make_group(2)


async def test_an_answer_that_was_lost_is_read_again(
    queue: GroupQueue, client: redis.asyncio.Redis, job_id: str, make_group: MakeGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miles.queue.consumer._RECOVER_EVERY_S", 0.0)
    await queue.put(make_group(0), attempt=1)
    await queue.collect([0], 5)
    await queue.put(make_group(1), attempt=1)
    # As when the connection breaks after Redis handed the entry out: pending for this consumer, which never saw it.
    await client.xreadgroup("trainer", "trainer", {JobKeys(job_id).groups: ">"})
    assert list(await queue.collect([1], 10)) == [1]


async def test_an_entry_that_cannot_be_decoded_goes_to_the_dead_letters(
    queue: GroupQueue, client: redis.asyncio.Redis, job_id: str, make_group: MakeGroup
) -> None:
    keys = JobKeys(job_id)
    await queue.put(make_group(1), attempt=1)
    await client.xadd(keys.groups, {"group_id": "2", "group": b"\xff\xff garbage"})
    await client.xadd(keys.groups, {"nonsense": "x"})
    wrong = await client.xadd(keys.groups, {"group_id": "3"})
    for group_id in (2, 3):
        with pytest.raises(UnreadableGroups, match=f"group {group_id}") as error:
            await queue.collect([1, group_id], 5)
        assert error.value.group_ids == [group_id]
    assert list(await queue.collect([1], 5)) == [1]
    letters = await queue.dead_letters()
    assert [letter["dead_group_id"] for letter in letters] == [b"3", b"2", b""]
    assert letters[0]["dead_entry_id"] == wrong
    assert b"neither" in letters[0]["dead_reason"]
    assert letters[1]["group"] == b"\xff\xff garbage"
    assert await client.xlen(keys.groups) == 1


@pytest.mark.parametrize("damage", ["delete", "change"])
async def test_a_lost_or_changed_blob_frees_its_group_to_be_put_again(
    damage: str, queue: GroupQueue, client: redis.asyncio.Redis, job_id: str, make_group: MakeGroup
) -> None:
    group = make_group(1, response_tokens=2000)
    await queue.put(group, attempt=1)
    (blob,) = [key async for key in client.scan_iter(f"{JobKeys(job_id).blob_prefix}*")]
    await (client.delete(blob) if damage == "delete" else client.setrange(blob, 100, b"?"))
    with pytest.raises(UnreadableGroups, match="blob"):
        await queue.collect([1], 5)
    assert await queue.outstanding() == []
    await queue.put(group, attempt=2)
    assert (await queue.collect([1], 5))[1][1] == group


async def test_a_large_blob_is_stored_in_pieces_that_live_and_go_together(
    queue: GroupQueue, client: redis.asyncio.Redis, job_id: str, make_group: MakeGroup
) -> None:
    group = make_group(1, response_tokens=20_000, experts=(60, 8))
    prefix = JobKeys(job_id).blob_prefix
    await queue.put(group, attempt=1)
    [record] = await queue.outstanding()
    keys = [key async for key in client.scan_iter(f"{prefix}*")]
    assert len(keys) == -(-record.nbytes // PIECE_BYTES) == 3
    assert {await client.strlen(key) <= PIECE_BYTES for key in keys} == {True}
    assert len({await client.ttl(key) // 3600 for key in keys}) == 1
    [(_, found)] = (await queue.collect([1], 30)).values()
    assert found == group
    assert not found.samples[0].tokens.flags.writeable
    await client.delete(max(keys))
    with pytest.raises(UnreadableGroups, match="is gone"):
        await queue.collect([1], 5)
    assert [key async for key in client.scan_iter(f"{prefix}*")] == []
    await queue.put(group, attempt=2)
    assert await queue.acknowledge([1]) == 1
    assert [key async for key in client.scan_iter(f"{prefix}*")] == []


async def test_a_blob_lives_longer_once_an_entry_refers_to_it(
    client: redis.asyncio.Redis, job_id: str, make_group: MakeGroup
) -> None:
    queue = GroupQueue(client, job_id, inline_limit=10, blob_ttl_s=100_000)
    for attempt in (1, 2):
        await queue.put(make_group(1), attempt=attempt)
        (blob,) = [key async for key in client.scan_iter(f"{JobKeys(job_id).blob_prefix}*")]
        assert 99_000 < await client.ttl(blob) <= 100_000


async def test_a_full_redis_makes_put_wait_and_loses_nothing(
    tmp_path: pathlib.Path, job_id: str, make_group: MakeGroup
) -> None:
    with RedisServer(tmp_path, maxmemory_bytes=12 << 20) as server:
        client = await connect_async(server.url)
        queue = GroupQueue(client, job_id, inline_limit=1 << 20)
        put = 0

        async def fill() -> None:
            nonlocal put
            while True:
                # Alternately inline and as a blob: both writes must be refused whole.
                tokens = 20_000 if put % 2 else 90_000
                await queue.put(make_group(put, response_tokens=tokens), attempt=1, deadline_s=0.1)
                put += 1

        with pytest.raises(QueueFull, match="maxmemory"):
            await fill()
        assert [entry.group_id for entry in await queue.outstanding()] == list(range(put))
        blocked = asyncio.ensure_future(queue.put(make_group(put, response_tokens=20_000), attempt=1, deadline_s=30))
        await asyncio.sleep(0.1)
        # The trainer reads, buries and acknowledges although there is no room.
        await queue.collect(range(put), 20)
        await queue.acknowledge(range(put))
        await blocked
        assert (await queue.collect([put], 5))[put][1] == make_group(put, response_tokens=20_000)
        await client.aclose()


async def test_a_full_redis_says_of_large_groups_too_that_they_are_queued_or_refused(
    tmp_path: pathlib.Path, job_id: str, make_group: MakeGroup
) -> None:
    with RedisServer(tmp_path) as server:
        client = await connect_async(server.url)
        queue = GroupQueue(client, job_id, inline_limit=1000)
        entry = await queue.put(make_group(0, response_tokens=2000), attempt=1)
        await queue.fence("w", 5)
        await client.config_set("maxmemory", 1000)
        with pytest.raises(OutOfMemoryError):
            await client.set("filler", b"x")
        assert await queue.put(make_group(0, response_tokens=2000), attempt=2, deadline_s=5) == entry
        with pytest.raises(Fenced):
            await queue.put(make_group(1, response_tokens=2000), attempt=1, holder=Holder("w", 4), deadline_s=5)
        with pytest.raises(QueueFull):
            await queue.put(make_group(1, response_tokens=2000), attempt=1, deadline_s=0.1)
        await client.aclose()


async def test_a_trainer_and_a_controller_that_restart_on_a_full_redis_make_room(
    tmp_path: pathlib.Path, job_id: str, make_group: MakeGroup
) -> None:
    with RedisServer(tmp_path, maxmemory_bytes=12 << 20) as server:
        client = await connect_async(server.url)
        rollout = GroupQueue(client, job_id)
        put = 0

        async def fill() -> None:
            nonlocal put
            while True:
                await rollout.put(make_group(put, response_tokens=10_000), attempt=1, deadline_s=0.1)
                put += 1

        with pytest.raises(QueueFull):
            await fill()
        await client.config_set("maxmemory", 6 << 20)
        with pytest.raises(OutOfMemoryError):
            await client.set("filler", b"x")
        controller, trainer = GroupQueue(client, job_id), GroupQueue(client, job_id)
        assert await controller.begin_life() == 1
        await controller.fence("*", 5)
        assert await controller.drop(put, "no spread")
        assert len(await trainer.collect(range(put), 20)) == put
        assert await trainer.acknowledge(range(put + 1)) == put
        await rollout.put(make_group(put + 1, response_tokens=10_000), attempt=1, deadline_s=5)
        await client.aclose()


async def test_killing_redis_loses_no_group_and_stops_neither_side(
    tmp_path: pathlib.Path, job_id: str, make_group: MakeGroup
) -> None:
    server = RedisServer(tmp_path, port=0, appendfsync="always").start()
    client = await connect_async(server.url)
    queue = GroupQueue(client, job_id)
    trainer = GroupQueue(await connect_async(server.url), job_id)
    for i in range(10):
        await queue.put(make_group(i), attempt=1)
    await trainer.collect(range(5), 5)
    waiting = asyncio.ensure_future(trainer.collect(range(20), 30))
    await asyncio.sleep(0.05)
    server.kill()
    putting = [asyncio.ensure_future(queue.put(make_group(i), attempt=1)) for i in range(10, 20)]
    await asyncio.sleep(0.1)
    await asyncio.to_thread(server.start)
    await asyncio.gather(*putting)
    collected = await waiting
    assert [collected[i][1] for i in range(20)] == [make_group(i) for i in range(20)]
    assert await trainer.acknowledge(range(20)) == 20
    assert await queue.outstanding() == []
    await trainer._redis.aclose()
    await client.aclose()
    server.stop()


async def test_redis_may_be_away_for_longer_than_the_client_tries(
    tmp_path: pathlib.Path, job_id: str, make_group: MakeGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miles.queue.client.RETRIES", 0)
    server = RedisServer(tmp_path, port=0, appendfsync="always").start()
    client, other = await connect_async(server.url), await connect_async(server.url)
    queue, trainer = GroupQueue(client, job_id), GroupQueue(other, job_id)
    await queue.put(make_group(0), attempt=1)
    await trainer.collect([0], 5)
    server.kill()
    putting = asyncio.ensure_future(queue.put(make_group(1), attempt=1))
    waiting = asyncio.ensure_future(trainer.collect([0, 1], 60))
    acknowledging = asyncio.ensure_future(queue.acknowledge([0]))
    await asyncio.sleep(0.5)
    assert not putting.done()
    assert not waiting.done()
    await asyncio.to_thread(server.start)
    await asyncio.gather(putting, acknowledging, return_exceptions=True)
    assert [entry.group_id for entry in await queue.outstanding()] == [1]
    await queue.put(make_group(0), attempt=2)
    assert list(await waiting) == [0, 1]
    await client.aclose()
    await other.aclose()
    server.stop()


async def test_collect_with_no_time_left_still_returns_what_is_there(queue: GroupQueue, make_group: MakeGroup) -> None:
    await queue.put(make_group(1), attempt=1)
    assert list(await queue.collect([1], 0)) == [1]
    await queue.put(make_group(2), attempt=1)
    assert list(await queue.collect([1, 2], 0)) == [1, 2]
    with pytest.raises(MissingGroups):
        await queue.collect([3], 0)


async def test_a_flushed_redis_is_set_up_again(tmp_path: pathlib.Path, job_id: str, make_group: MakeGroup) -> None:
    with RedisServer(tmp_path) as server:
        client = await connect_async(server.url)
        queue = GroupQueue(client, job_id)
        await queue.put(make_group(0), attempt=1)
        await queue.collect([0], 5)
        await client.flushall()
        await queue.put(make_group(1), attempt=1)
        assert list(await queue.collect([1], 10)) == [1]
        await client.aclose()


async def test_dropping_a_job_leaves_other_jobs_alone_until_it_is_taken_up_again(
    queue: GroupQueue, client: redis.asyncio.Redis, job_id: str, make_group: MakeGroup
) -> None:
    other = GroupQueue(client, f"{job_id}-2", inline_limit=10)
    for owner in (queue, other):
        await owner.put(make_group(1, response_tokens=2000), attempt=1)
    await queue.drop_job()
    fences = JobKeys(job_id).fences
    assert [key async for key in client.scan_iter(f"{JobKeys(job_id).prefix}*")] == [fences.encode()]
    assert await client.ttl(fences) > 0
    with pytest.raises(Fenced):
        await queue.put(make_group(2), attempt=1, holder=Holder("rollout-0", 1 << 52))
    await queue.reopen(100)
    with pytest.raises(Fenced):
        await queue.put(make_group(2), attempt=1, holder=Holder("rollout-0", 99))
    await queue.put(make_group(2), attempt=1, holder=Holder("rollout-0", 100))
    assert await client.ttl(fences) == -1
    await queue.reopen(50)
    with pytest.raises(Fenced):
        await queue.put(make_group(3), attempt=1, holder=Holder("rollout-0", 99))
    await queue.drop_job()
    assert len(await other.outstanding()) == 1
    assert list(await other.collect([1], 5)) == [1]
    await other.drop_job()


async def test_a_result_of_a_lease_that_is_over_is_refused(queue: GroupQueue, make_group: MakeGroup) -> None:
    old, new = Holder("rollout-0", 7), Holder("rollout-0", 9)
    await queue.put(make_group(1), attempt=1, holder=old)
    await queue.fence("rollout-0", 9)
    await queue.fence("rollout-0", 8)
    with pytest.raises(Fenced, match="group 2: lease 7 of rollout-0 is over"):
        await queue.put(make_group(2), attempt=1, holder=old)
    with pytest.raises(Fenced):
        await queue.drop(3, "zero_std", holder=old)
    await queue.put(make_group(2), attempt=2, holder=new)
    await queue.put(make_group(4), attempt=1, holder=Holder("rollout-1", 2))
    assert await queue.drop(3, "zero_std", holder=new)
    assert [entry.group_id for entry in await queue.outstanding()] == [1, 2, 4]
    await queue.fence("*", 100)
    with pytest.raises(Fenced):
        await queue.put(make_group(5), attempt=1, holder=Holder("rollout-1", 99))
    await queue.put(make_group(5), attempt=1, holder=Holder("rollout-1", 100))


async def test_a_dropped_group_is_remembered_until_it_is_acknowledged(queue: GroupQueue, make_group: MakeGroup) -> None:
    assert await queue.drop(1, "zero_std_0")
    assert await queue.drop(1, "another reason")
    await queue.put(make_group(2), attempt=1)
    assert not await queue.drop(2, "too late")
    assert await queue.dropped() == {1: "zero_std_0"}
    assert await queue.why_dropped(1) == "zero_std_0"
    assert await queue.why_dropped(2) is None
    assert await queue.acknowledge([1, 2]) == 1
    assert await queue.dropped() == {}


async def test_what_an_ended_job_has_queued_expires_unless_it_is_taken_up_again(
    queue: GroupQueue, client: redis.asyncio.Redis, job_id: str, make_group: MakeGroup
) -> None:
    await queue.begin_life()
    await queue.fence("rollout-0", 3)
    await queue.drop(9, "zero_std_0")
    for group in (make_group(1), make_group(2, response_tokens=2000)):
        await queue.put(group, attempt=1)
    keys = [key async for key in client.scan_iter(match=f"{JobKeys(job_id).prefix}*")]
    assert {key.decode() for key in keys} >= {JobKeys(job_id).groups, JobKeys(job_id).index, JobKeys(job_id).blob_refs}
    await queue.retire()
    assert [key for key in keys if await client.ttl(key) < 0] == []
    assert await queue.begin_life() == 2
    lasting = [key for key in keys if key.decode() in JobKeys(job_id).lasting]
    assert [key for key in lasting if await client.ttl(key) != -1] == []
    assert [entry.group_id for entry in await queue.outstanding()] == [1, 2]
