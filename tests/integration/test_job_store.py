"""Job records and events in a real Redis."""

from __future__ import annotations

import asyncio
import pathlib
import time
import uuid
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from redis.exceptions import OutOfMemoryError

from miles.queue import RedisServer, connect_async
from miles.rpc.gen import job_pb2
from miles.services.controller.jobs.store import JobStore, UnknownJobError, new_job


@pytest_asyncio.fixture
async def store(redis_url: str) -> AsyncIterator[JobStore]:
    client = await connect_async(redis_url)
    yield JobStore(client)
    await client.aclose()


def event(job_id: str, step: int) -> job_pb2.JobEvent:
    return job_pb2.JobEvent(job_id=job_id, metrics=job_pb2.Metrics(step=step))


async def test_concurrent_submits_with_one_request_id_make_one_job(store: JobStore) -> None:
    request_id = uuid.uuid4().hex
    results = await asyncio.gather(*(store.submit(new_job({"name": "a"}, 1), request_id) for _ in range(20)))
    assert len({job.job_id for job, _ in results}) == 1
    assert [created for _, created in results].count(True) == 1


async def test_jobs_without_a_request_id_are_always_new(store: JobStore) -> None:
    (first, one), (second, two) = [await store.submit(new_job({"name": "a"}, 1), "") for _ in range(2)]
    assert first.job_id != second.job_id
    assert one
    assert two


async def test_pages_list_every_job_once_newest_first(store: JobStore) -> None:
    made = [(await store.submit(new_job({"name": f"page{i}"}, 1), ""))[0].job_id for i in range(7)]
    listed: list[str] = []
    token = ""
    while True:
        jobs, token = await store.list(page_size=3, page_token=token)
        listed += [job.job_id for job in jobs]
        if not token:
            break
    assert [job_id for job_id in listed if job_id in made] == made[::-1]
    assert len(set(listed)) == len(listed)


async def test_unknown_job(store: JobStore) -> None:
    with pytest.raises(UnknownJobError):
        await store.get("nobody")


async def test_watching_resumes_after_the_last_event_seen_and_ends_with_the_job(store: JobStore) -> None:
    job, _ = await store.submit(new_job({"name": "watch"}, 3), "")
    for step in range(3):
        await store.add_event(event(job.job_id, step))
    seen = []
    async for got in store.watch(job.job_id, ""):
        seen.append(got)
        if len(seen) == 2:
            break
    assert [got.metrics.step for got in seen] == [0, 1]

    async def finish() -> None:
        await asyncio.sleep(0.1)
        await store.add_event(event(job.job_id, 3))
        job.state = job_pb2.JOB_STATE_SUCCEEDED
        await store.put(job)

    finishing = asyncio.create_task(finish())
    rest = [got.metrics.step async for got in store.watch(job.job_id, seen[-1].event_id)]
    await finishing
    assert rest == [2, 3]


async def test_jobs_are_recorded_on_a_full_redis(tmp_path: pathlib.Path) -> None:
    with RedisServer(tmp_path) as server:
        client = await connect_async(server.url)
        store = JobStore(client)
        job, _ = await store.submit(new_job({"name": "full"}, 3), "")
        await client.set("filler", b"x" * (8 << 20))
        await client.config_set("maxmemory", 4 << 20)
        with pytest.raises(OutOfMemoryError):
            await client.set("more", b"x")
        job.state = job_pb2.JOB_STATE_RUNNING
        changed = job_pb2.JobStateChanged(state=job.state, reason="it has begun")
        await store.put(job, job_pb2.JobEvent(job_id=job.job_id, state_changed=changed))
        await store.add_event(job_pb2.JobEvent(job_id=job.job_id, metrics=job_pb2.Metrics(step=0)))
        assert (await store.get(job.job_id)).state == job_pb2.JOB_STATE_RUNNING
        kinds = [event.WhichOneof("kind") for event in await store.events(job.job_id, "", 10)]
        assert kinds == ["state_changed", "metrics"]
        await store.add_operation(job.job_id, "key", 3)
        assert await store.operation(job.job_id, "key") == 3
        assert await store.first_lease_number() > 0
        await client.aclose()


async def test_lease_numbers_ascend_when_the_clock_is_set_back(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_ns = time.time_ns()
    first = await store.first_lease_number()
    assert first >= now_ns // 1_000_000
    monkeypatch.setattr(time, "time_ns", lambda: now_ns - 3600 * 10**9)
    second, third = await store.first_lease_number(), await store.first_lease_number()
    assert first + 1_000_000 < second
    assert second + 1_000_000 < third < 1 << 53
