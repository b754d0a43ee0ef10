from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest

from miles.queue import JobKeys, PartialStore, connect_async
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
