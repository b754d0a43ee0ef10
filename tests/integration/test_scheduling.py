"""What users ask of jobs in a real Redis while the scheduler decides about them: nothing is lost between the two."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
from collections.abc import AsyncIterator

import pytest_asyncio
import redis.asyncio

from miles.queue import RedisServer, connect_async
from miles.rpc.gen import controller_pb2, job_pb2
from miles.services.controller.jobs.controls import JobControls
from miles.services.controller.jobs.runner import JobRunner
from miles.services.controller.jobs.scheduler import JobScheduler
from miles.services.controller.jobs.store import JobStore, new_job
from miles.services.controller.workers.registry import WorkerRegistry
from miles.tasks import cancelled_at_end


class SlowStore(JobStore):
    """Answers what it has read only when it may: that can change meanwhile."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        super().__init__(client)
        self.asked, self.may_answer = asyncio.Event(), asyncio.Event()

    async def get(self, job_id: str) -> job_pb2.Job:
        found = await super().get(job_id)
        self.asked.set()
        await self.may_answer.wait()
        return found

    async def live(self) -> list[job_pb2.Job]:
        found = await super().live()
        self.asked.set()
        await self.may_answer.wait()
        return found


class EmptyRun(JobRunner):
    """Runs jobs without workers, until the user ends them."""

    def __init__(self, store: JobStore, registry: WorkerRegistry, client: redis.asyncio.Redis) -> None:
        super().__init__(store, registry, client, "redis://none")
        self.seen: list[JobControls] = []
        self.has_ended, self.may_return = asyncio.Event(), asyncio.Event()

    async def run(self, job: job_pb2.Job, controls: JobControls) -> None:
        self.seen.append(controls)
        await controls.wait_for_end()
        job.state = job_pb2.JOB_STATE_CANCELLED if controls.cancel else job_pb2.JOB_STATE_STOPPED
        await self._store.put(job)
        self.has_ended.set()
        await self.may_return.wait()


class World:
    """A scheduler over a store that can be slow."""

    def __init__(self, client: redis.asyncio.Redis, folder: pathlib.Path) -> None:
        self.store = SlowStore(client)
        registry = WorkerRegistry(first_lease_number=1)
        self.runner = EmptyRun(self.store, registry, client)
        self.scheduler = JobScheduler(self.store, self.runner, registry)
        self._folder = folder

    async def add(self, state: job_pb2.JobState.ValueType, **settings: object) -> job_pb2.Job:
        job = new_job({"name": "one", "run_dir": str(self._folder / "one"), "num_rollout": 2, **settings}, 2)
        self.store.may_answer.set()
        job, _ = await self.store.submit(job, "run:one", is_run=True)
        job.state = state
        await self.store.put(job)
        self.store.asked.clear()
        self.store.may_answer.clear()
        return job

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with cancelled_at_end(asyncio.create_task(self.scheduler.run())), asyncio.timeout(60):
            yield

    async def has_run(self, times: int) -> JobControls:
        while len(self.runner.seen) < times:  # noqa: ASYNC110 (the scheduler calls the runner)
            await asyncio.sleep(0.01)
        return self.runner.seen[-1]


@pytest_asyncio.fixture
async def world(tmp_path: pathlib.Path) -> AsyncIterator[World]:
    with RedisServer(tmp_path / "redis") as server:
        client = await connect_async(server.url)
        yield World(client, tmp_path)
        await client.aclose()


async def test_a_job_that_is_cancelled_while_it_is_chosen_does_not_run_on(world: World) -> None:
    job = await world.add(job_pb2.JOB_STATE_QUEUED)
    async with world.running():
        await world.store.asked.wait()
        cancelling = asyncio.create_task(
            world.scheduler.control(job.job_id, controller_pb2.JOB_ACTION_CANCEL, "cancel-1")
        )
        world.store.may_answer.set()
        await cancelling
        assert (await world.has_run(1)).cancel
        await world.runner.has_ended.wait()


async def test_what_comes_too_late_for_a_run_does_not_end_its_resumption(world: World) -> None:
    job = await world.add(job_pb2.JOB_STATE_RUNNING)
    world.store.may_answer.set()
    world.runner.may_return.set()
    async with world.running():
        controls = await world.has_run(1)
        world.store.may_answer.clear()
        world.store.asked.clear()
        stopping = asyncio.create_task(world.scheduler.control(job.job_id, controller_pb2.JOB_ACTION_STOP, ""))
        await world.store.asked.wait()  # it has read that the job runs
        controls.apply(controller_pb2.JOB_ACTION_STOP)
        await world.runner.has_ended.wait()
        await asyncio.sleep(0.05)  # in which the scheduler would forget the run, if it could
        world.store.may_answer.set()
        await stopping
        await world.scheduler.control(job.job_id, controller_pb2.JOB_ACTION_RESUME, "")
        assert not (await world.has_run(2)).stop


async def test_a_checkpoint_of_a_paused_job_that_was_interrupted_leaves_it_paused(world: World) -> None:
    job = await world.add(job_pb2.JOB_STATE_PAUSED)
    world.store.may_answer.set()
    await world.scheduler.control(job.job_id, controller_pb2.JOB_ACTION_CHECKPOINT, "")
    async with world.running():
        controls = await world.has_run(1)
    assert controls.paused
    assert controls.checkpoint


async def test_a_job_that_has_not_ended_takes_the_settings_of_its_command_given_again(
    world: World, tmp_path: pathlib.Path
) -> None:
    save = str(tmp_path / "kept")
    for state in (job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_PAUSED, job_pb2.JOB_STATE_STOPPED):
        job = await world.add(state, save=save)
        world.store.may_answer.set()
        settings = {**json.loads(job.config_json), "num_rollout": 3}
        job, goes_on = await world.scheduler.go_on(job.job_id, settings)
        assert goes_on
        assert json.loads((await world.store.get(job.job_id)).config_json)["num_rollout"] == 3
