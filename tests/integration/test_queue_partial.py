from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest

from miles.queue import JobKeys, PartialStore, connect_async
from miles.queue.payload import encode_group
from miles.types import SampleGroup, SampleStatus


@pytest.fixture
async def store(redis_url: str, job_id: str) -> AsyncIterator[PartialStore]:
    client = await connect_async(redis_url)
    yield PartialStore(client, job_id)
    await client.aclose()


async def test_a_half_finished_group_is_stored_loaded_and_deleted(
    store: PartialStore, make_group: Callable[..., SampleGroup]
) -> None:
    group = make_group(4, experts=(2, 2))
    group.samples[1].status = SampleStatus.PENDING
    assert await store.load(4) is None
    assert await store.save(4, group)
    assert await store.load(4) == group
    await store.delete(4)
    await store.delete(4)
    assert await store.load(4) is None


async def test_an_older_attempt_does_not_overwrite_a_newer_one(
    store: PartialStore, make_group: Callable[..., SampleGroup]
) -> None:
    newer, older = make_group(4, response_tokens=9), make_group(4, response_tokens=3)
    assert await store.save(4, newer, attempt=10)
    assert not await store.save(4, older, attempt=9)
    assert await store.load(4) == newer
    assert await store.save(4, older, attempt=10)
    assert await store.load(4) == older


async def test_what_is_stored_outlives_a_long_pause_and_expires(
    store: PartialStore, job_id: str, make_group: Callable[..., SampleGroup]
) -> None:
    await store.save(1, make_group(1))
    day_s = 24 * 3600
    assert 29 * day_s < await store._redis.ttl(JobKeys(job_id).partial(1)) <= 30 * day_s


async def test_only_samples_that_have_changed_are_sent_again(
    store: PartialStore, job_id: str, make_group: Callable[..., SampleGroup]
) -> None:
    group = make_group(4, experts=(2, 2))
    group.samples[1].status = SampleStatus.PENDING
    assert await store.save(4, group, attempt=1)
    key = JobKeys(job_id).partial(4)
    before = await store._redis.hgetall(key)
    group.samples[1].status = SampleStatus.COMPLETED
    assert await store.save(4, group, attempt=1, changed=[1])
    after = await store._redis.hgetall(key)
    assert {name for name in after if after[name] != before[name]} == {b"sample:1"}
    assert await store.load(4) == group


async def test_all_samples_are_sent_when_those_that_have_not_changed_are_gone(
    store: PartialStore, make_group: Callable[..., SampleGroup]
) -> None:
    group = make_group(4)
    await store.save(4, group, attempt=1)
    await store.delete(4)
    assert await store.save(4, group, attempt=1, changed=[0])
    assert await store.load(4) == group
    assert await store.save(4, group, attempt=2, changed=[])
    assert not await store.save(4, group, attempt=1, changed=[0])


async def test_a_group_with_fewer_samples_leaves_none_of_the_one_before(
    store: PartialStore, make_group: Callable[..., SampleGroup]
) -> None:
    group = make_group(4)
    await store.save(4, group)
    del group.samples[1:]
    assert await store.save(4, group)
    assert await store.load(4) == group


async def test_a_group_that_an_earlier_version_stored_whole_is_loaded(
    store: PartialStore, job_id: str, make_group: Callable[..., SampleGroup]
) -> None:
    group = make_group(4, experts=(2, 2))
    await store._redis.hset(JobKeys(job_id).partial(4), mapping={"attempt": 1, "group": encode_group(group)})
    assert await store.load(4) == group
    assert await store.save(4, group, attempt=1)
    assert await store.load(4) == group
