"""Jobs, their folders and their records in a real Redis: what is wrong with one ends that one alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import pathlib
import shutil
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
import redis.asyncio
import torch
from weightsync_processes import Service

from miles.config import JobConfig
from miles.ownership.owner_file import NAME, new_owner, run_of, write_owner
from miles.queue import RedisServer, RedisUnsuitable, connect_async
from miles.rpc.gen import controller_pb2, job_pb2
from miles.services.controller.errors import ConflictError, NotPossibleNowError
from miles.services.controller.jobs.controls import JobControls
from miles.services.controller.jobs.runner import JobRunner
from miles.services.controller.jobs.scheduler import JobScheduler
from miles.services.controller.jobs.store import JobStore, UnknownJobError, new_job
from miles.services.controller.workers.registry import WorkerRegistry
from miles.tasks import cancelled_at_end


@pytest_asyncio.fixture
async def client(tmp_path: pathlib.Path) -> AsyncIterator[redis.asyncio.Redis]:
    with RedisServer(tmp_path / "redis") as server:
        connected = await connect_async(server.url)
        yield connected
        await connected.aclose()


@pytest.fixture
def store(client: redis.asyncio.Redis) -> JobStore:
    return JobStore(client)


def record(tmp_path: pathlib.Path, name: str, **changes: Any) -> job_pb2.Job:
    settings = {
        "name": name,
        "run_dir": str(tmp_path / name),
        "device": "cpu",
        "hf_checkpoint": str(tmp_path / "model"),
        "prompt_data": str(tmp_path / "none.jsonl"),
        "rm_type": "exact_match",
        "label_key": "label",
        "rollout_batch_size": 1,
        "n_samples_per_prompt": 2,
        "rollout_max_response_len": 1,
        "num_rollout": 1,
    }
    return new_job(JobConfig.from_flat({**settings, **changes}).resolve().to_flat(), 1)


def sharing(tmp_path: pathlib.Path) -> dict[str, dict[str, str]]:
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    return {
        "the same run folder": {"run_dir": f"{tmp_path}/one"},
        "the same save": {"save": f"{tmp_path}/kept"},
        "the same save through a link": {"save": f"{tmp_path}/link/"},
        "the same save with dots": {"save": f"{tmp_path}/x/../kept"},
        "save in the other's run folder": {"save": f"{tmp_path}/one/checkpoints"},
        "save_hf above the other's save": {"save_hf": f"{tmp_path}"},
        "the same save_hf": {"save_hf": f"{tmp_path}/hf/{{rollout_id:03d}}"},
        "one step of the other's save_hf": {"save_hf": f"{tmp_path}/hf/2"},
        "a run folder in the other's": {"run_dir": f"{tmp_path}/one/two"},
        "a run folder around the other's": {"run_dir": f"{tmp_path}"},
    }


async def test_two_live_jobs_share_no_folder_in_whatever_way_it_is_written(
    store: JobStore, tmp_path: pathlib.Path
) -> None:
    save, save_hf = f"{tmp_path}/kept", f"{tmp_path}/hf/{{rollout_id}}"
    first, _ = await store.submit(record(tmp_path, "one", save=save, save_hf=save_hf), "")
    for text, changes in sharing(tmp_path).items():
        with pytest.raises(ConflictError, match=rf"{first.job_id} \(queued\) writes to"):
            await store.submit(record(tmp_path, "two", **changes), text)
    await store.submit(
        record(tmp_path, "three", save=f"{tmp_path}/kept-2", save_hf=f"{tmp_path}/hf-{{rollout_id}}"), ""
    )


async def test_a_job_that_has_ended_is_resumed_unless_another_has_its_folder_now(
    client: redis.asyncio.Redis, store: JobStore, tmp_path: pathlib.Path
) -> None:
    first, _ = await store.submit(record(tmp_path, "one", save=f"{tmp_path}/kept"), "")
    first.state = job_pb2.JOB_STATE_STOPPED
    await store.put(first)
    second, _ = await store.submit(record(tmp_path, "two", save=f"{tmp_path}/kept"), "")
    registry = WorkerRegistry(first_lease_number=1)
    scheduler = JobScheduler(store, JobRunner(store, registry, client, "redis://none"), registry)
    with pytest.raises(ConflictError, match=second.job_id):
        await scheduler.control(first.job_id, controller_pb2.JOB_ACTION_RESUME, "")
    second.state = job_pb2.JOB_STATE_CANCELLED
    await store.put(second)
    resumed = await scheduler.control(first.job_id, controller_pb2.JOB_ACTION_RESUME, "")
    assert resumed.state == job_pb2.JOB_STATE_QUEUED


async def test_a_run_is_known_by_its_folder_and_not_by_its_name(store: JobStore, tmp_path: pathlib.Path) -> None:
    one, two = record(tmp_path, "one"), record(tmp_path, "two")
    assert await store.submit(one, "run:miles", is_run=True) == (one, True)
    assert await store.submit(two, "run:miles", is_run=True) == (two, True)
    for first in (one, two):
        again = record(tmp_path, first.name)
        assert await store.submit(again, "run:miles", is_run=True) == (first, False)


async def test_a_run_folder_of_a_job_that_another_redis_knew_is_refused_to_a_new_one(
    store: JobStore, tmp_path: pathlib.Path
) -> None:
    run_of(tmp_path / "one", "one-of-before")
    with pytest.raises(ConflictError, match=rf"job one-of-before.*delete .*{NAME}"):
        await store.submit(record(tmp_path, "one"), "rest:alice:1")
    _, created = await store.submit(record(tmp_path, "one"), "run:miles", is_run=True)
    assert created


async def test_a_run_folder_of_a_job_that_has_ended_is_refused_with_the_way_to_go_on(
    store: JobStore, tmp_path: pathlib.Path
) -> None:
    first, _ = await store.submit(record(tmp_path, "one"), "rest:alice:1")
    run_of(tmp_path / "one", first.job_id)
    first.state = job_pb2.JOB_STATE_STOPPED
    await store.put(first)
    with pytest.raises(ConflictError, match=rf"job {first.job_id} has that folder; resume that job"):
        await store.submit(record(tmp_path, "one"), "rest:alice:2")


async def test_a_record_that_cannot_be_read_is_a_failed_job_beside_the_others(
    client: redis.asyncio.Redis, store: JobStore, tmp_path: pathlib.Path
) -> None:
    jobs = [(await store.submit(record(tmp_path, name), ""))[0] for name in ("a", "b", "c", "d", "good")]
    odd = job_pb2.Job(job_id=jobs[3].job_id, config_json="[]", state=job_pb2.JOB_STATE_QUEUED)
    await client.set(f"miles:job:{jobs[0].job_id}", b"\xff\xff")
    await client.delete(f"miles:job:{jobs[1].job_id}")
    await client.delete(f"miles:job:{jobs[2].job_id}")
    await client.rpush(f"miles:job:{jobs[2].job_id}", "another kind")
    await client.set(f"miles:job:{jobs[3].job_id}", odd.SerializeToString())
    listed, _ = await store.list()
    assert {job.job_id for job in listed} == {job.job_id for job in jobs}
    assert [job.job_id for job in await store.live()] == [jobs[4].job_id]
    broken = await store.get(jobs[0].job_id)
    assert broken.state == job_pb2.JOB_STATE_FAILED
    assert f"the record of job {broken.job_id} in Redis cannot be read" in broken.error
    with pytest.raises(UnknownJobError):
        await store.get(jobs[1].job_id)
    registry = WorkerRegistry(first_lease_number=1)
    scheduler = JobScheduler(store, JobRunner(store, registry, client, "redis://none"), registry)
    with pytest.raises(NotPossibleNowError, match="cannot be read"):
        await scheduler.control(broken.job_id, controller_pb2.JOB_ACTION_RESUME, "")


async def test_keys_of_another_application_are_refused(client: redis.asyncio.Redis, store: JobStore) -> None:
    await store.check_keys()
    await client.rpush("miles:controller", "a list")
    with pytest.raises(RedisUnsuitable, match="miles:controller in Redis is a list and not a string"):
        await store.check_keys()
    await client.delete("miles:controller")
    await client.set("miles:jobs", "a string")
    with pytest.raises(RedisUnsuitable, match="miles:jobs in Redis is a string and not a zset"):
        await store.check_keys()


async def test_emptying_redis_is_noticed(client: redis.asyncio.Redis, store: JobStore) -> None:
    await store.first_lease_number()
    assert not await store.is_emptied()
    await client.flushall()
    assert await store.is_emptied()


def file_above(folder: pathlib.Path) -> None:
    folder.write_text("a file where the folder should be")


def pipe_as_owner_file(folder: pathlib.Path) -> None:
    folder.mkdir()
    os.mkfifo(folder / NAME)


def folder_of_an_export(folder: pathlib.Path) -> None:
    folder.mkdir()
    write_owner(folder, new_owner("export", "another", folder))


def somebodys_metrics(folder: pathlib.Path) -> None:
    (folder / "metrics.jsonl").mkdir(parents=True)


def pipe_as_summary(folder: pathlib.Path) -> None:
    run_of(folder)
    os.mkfifo(folder / "summary.tmp")


def folder_as_log_spans(folder: pathlib.Path) -> None:
    run_of(folder)
    (folder / "log_spans.json").mkdir()


@pytest.mark.parametrize(
    "poison",
    [file_above, pipe_as_owner_file, folder_of_an_export, somebodys_metrics, pipe_as_summary, folder_as_log_spans],
)
async def test_a_job_whose_run_folder_cannot_be_used_fails_by_itself(
    client: redis.asyncio.Redis, store: JobStore, tmp_path: pathlib.Path, poison: Any
) -> None:
    poison(tmp_path / "bad")
    job, _ = await store.submit(record(tmp_path, "bad"), uuid.uuid4().hex, is_run=True)
    runner = JobRunner(store, WorkerRegistry(first_lease_number=1), client, "redis://none", tmp_path / "logs")
    await runner.run(job, JobControls())
    stored = await store.get(job.job_id)
    assert stored.state == job_pb2.JOB_STATE_FAILED
    assert str(tmp_path / "bad") in stored.error
    changed = [event.state_changed.reason for event in await store.events(job.job_id, "", 100)]
    assert stored.error in changed


async def test_a_job_whose_settings_are_not_known_any_more_fails_by_itself(
    client: redis.asyncio.Redis, store: JobStore, tmp_path: pathlib.Path
) -> None:
    job = record(tmp_path, "old")
    job.config_json = json.dumps({**json.loads(job.config_json), "setting_of_before": 1})
    runner = JobRunner(store, WorkerRegistry(first_lease_number=1), client, "redis://none")
    await runner.run(job, JobControls())
    assert "setting_of_before" in (await store.get(job.job_id)).error


@contextlib.contextmanager
def weights_of_an_earlier_life(job: job_pb2.Job, folder: pathlib.Path) -> Iterator[tuple[WorkerRegistry, pathlib.Path]]:
    """A registry with a weight sync service that holds a version of the job, and the folder of its segments."""
    weights = folder / "weights"
    weights.mkdir()
    service = Service(None, weights)
    try:
        service.publish(0, {"weight": torch.ones(4)}, job=job.job_id)
        registry = WorkerRegistry(first_lease_number=1)
        kind = controller_pb2.WORKER_KIND_WEIGHTSYNC
        registration = controller_pb2.WorkerRegistration(worker_id="weightsync", kind=kind, address=service.address)
        registry.attach(registration)
        yield registry, weights
    finally:
        service.kill()


async def test_a_job_that_ends_before_it_is_connected_frees_the_weights_of_its_earlier_life(
    client: redis.asyncio.Redis, store: JobStore, tmp_path: pathlib.Path
) -> None:
    job, _ = await store.submit(record(tmp_path, "gone-data"), "")
    with weights_of_an_earlier_life(job, tmp_path) as (registry, weights):
        assert len(list(weights.glob(f"*{job.job_id}*"))) == 1
        await JobRunner(store, registry, client, "redis://none").run(job, JobControls())
        assert "none.jsonl" in (await store.get(job.job_id)).error
        assert list(weights.glob(f"*{job.job_id}*")) == []


async def test_a_job_keeps_what_workers_have_of_it_while_redis_is_away_and_frees_it_when_it_cannot_begin(
    client: redis.asyncio.Redis, store: JobStore, tmp_path: pathlib.Path
) -> None:
    job, _ = await store.submit(record(tmp_path, "file"), "")
    with weights_of_an_earlier_life(job, tmp_path) as (registry, weights):
        away = redis.asyncio.Redis(port=1)
        with pytest.raises(redis.exceptions.ConnectionError):
            await JobRunner(JobStore(away), registry, away, "redis://none").run(job, JobControls())
        assert len(list(weights.glob(f"*{job.job_id}*"))) == 1
        shutil.rmtree(tmp_path / "file")
        file_above(tmp_path / "file")
        job.state = job_pb2.JOB_STATE_QUEUED
        await JobRunner(store, registry, client, "redis://none").run(job, JobControls())
        assert (await store.get(job.job_id)).state == job_pb2.JOB_STATE_FAILED
        assert list(weights.glob(f"*{job.job_id}*")) == []


async def test_what_a_queued_job_waits_for_is_in_its_history_and_not_in_the_log_of_the_job_that_runs(
    client: redis.asyncio.Redis, store: JobStore, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    queued, _ = await store.submit(record(tmp_path, "two"), "")
    registry = WorkerRegistry(first_lease_number=1)
    scheduler = JobScheduler(store, JobRunner(store, registry, client, "redis://none"), registry)
    scheduler.running = "one-1f0c2a9b"
    scheduler.wake()
    async with cancelled_at_end(asyncio.create_task(scheduler.tell_waits())), asyncio.timeout(120):
        while not (events := await store.events(queued.job_id, "", 10)):  # noqa: ASYNC110 (a task of the scheduler writes it)
            await asyncio.sleep(0.1)
    assert events[0].log.text.startswith("waiting for")
    assert queued.job_id not in caplog.text
