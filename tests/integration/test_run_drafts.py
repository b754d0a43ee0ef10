"""The run's part of draft training: a real draft trainer, a real weight-sync service and an engine that follows it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pathlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio
import pytest
from draft_trainer_process import draft_config, record
from trainer_cases import write_dense_model
from weight_host import DRAFT, GatedEngine, Host

from miles.change_signal import ChangeSignal
from miles.config import JobConfig
from miles.queue import GroupQueue, connect_async
from miles.rpc import start_server
from miles.rpc.gen import controller_pb2, draft_trainer_pb2_grpc
from miles.services.controller.clients.weightsync import WeightSyncClient
from miles.services.controller.jobs.context import JobContext
from miles.services.controller.run.alerts import RunAlerts
from miles.services.controller.run.drafts import RunDrafts
from miles.services.controller.run.rollout_workers import RolloutWorkers
from miles.services.controller.speculation.acceptance import RunAcceptance
from miles.services.controller.status.worker_activity import WorkerActivities
from miles.services.controller.workers.registry import AttachedWorker, WorkerRegistry
from miles.services.controller.workers.reward_addresses import RewardAddresses
from miles.services.trainer.drafts.job import DraftJob
from miles.services.trainer.drafts.loading import load_job
from miles.services.trainer.drafts.service import SERVICE_NAME, DraftTrainerServicer
from miles.weights import WeightSubscriber

DEADLINE_S = 200.0
NAME = "draft-trainer-0"


class DraftTrainer:
    """The service in this process, attached to a registry."""

    def __init__(self, registry: WorkerRegistry, name: str = NAME) -> None:
        self.may_load = threading.Event()
        self.may_load.set()
        self.is_loading = False
        self._registry = registry
        self._name = name
        self._servicer = DraftTrainerServicer(self._load)
        self._server: grpc.aio.Server
        self.worker: AttachedWorker

    async def start(self, incarnation: str) -> None:
        self._server, address = await start_server(
            lambda server: draft_trainer_pb2_grpc.add_DraftTrainerServiceServicer_to_server(self._servicer, server),
            "127.0.0.1:0",
            [SERVICE_NAME],
        )
        registration = controller_pb2.WorkerRegistration(
            worker_id=self._name,
            kind=controller_pb2.WORKER_KIND_DRAFT_TRAINER,
            address=address,
            incarnation=incarnation,
            num_gpus=1,  # as one that has to leave its GPU
        )
        self.worker = self._registry.attach(registration)

    async def disconnect(self) -> None:
        """Break its connections; it goes on by itself."""
        await self._server.stop(None)
        self._registry.detach(self.worker)

    async def lose(self) -> None:
        """End as a process does whose connections break."""
        await self.disconnect()
        await self._servicer.close()

    def _load(self, *args: Any) -> DraftJob:
        self.is_loading = True
        assert self.may_load.wait(DEADLINE_S)
        return load_job(*args, device_name="cpu")


@pytest.fixture
async def host(tmp_path: pathlib.Path) -> AsyncIterator[Host]:
    (tmp_path / "shared").mkdir()
    host = Host(tmp_path / "shared")
    host.stream = DRAFT
    await host.start()
    yield host
    await host.close()


async def until(is_so: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < end, f"waited {DEADLINE_S:g} s for {what}"
        await asyncio.sleep(0.02)


async def test_a_run_follows_its_draft_trainer_and_goes_on_without_it(
    tmp_path: pathlib.Path, host: Host, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = draft_config(write_dense_model(tmp_path / "model"))
    run_dir = pathlib.Path(config.services.run_dir)
    context = JobContext("job", config, redis_url, run_dir)
    registry, alerts = WorkerRegistry(), RunAlerts(ChangeSignal())
    spans: list[tuple[str, str]] = []
    activities = WorkerActivities(lambda activity, _begin, _end, worker: spans.append((worker, activity)))
    service = registry.attach(
        controller_pb2.WorkerRegistration(
            worker_id="weightsync", kind=controller_pb2.WORKER_KIND_WEIGHTSYNC, address=host.address
        )
    )
    weightsync, engine = WeightSyncClient(service), GatedEngine()
    subscriber = WeightSubscriber(host.address, "job", "engine", DRAFT, engine)
    await subscriber.start()
    async with await connect_async(redis_url) as client:
        queue = GroupQueue(client, "job", consumer="test")
        acceptance, rewards = RunAcceptance.of_job(config, ()), RewardAddresses({})
        rollouts = RolloutWorkers(context, registry, queue, alerts, host.address, rewards, acceptance)
        drafts = RunDrafts(context, registry, weightsync, rollouts, alerts, activities)

        drafts.begin()
        assert drafts.take_metrics() == {"draft/version": 0, "draft/missed_recordings": 0}
        first = DraftTrainer(registry)
        await first.start("first")
        await until(lambda: drafts.describe() == "waiting for the run to be loaded", "the draft, beside the run")
        drafts.loaded(0)
        record(run_dir, 0)
        await until(lambda: drafts.active == 1, "version 1")
        await until(lambda: engine.version == 1, "the engine")
        metrics = drafts.take_metrics()
        assert metrics["draft/version"] == 1
        assert {"draft/loss", "draft/update_s"} <= metrics.keys()
        assert "draft/loss" not in drafts.take_metrics(), "it is of a version, and was told"
        await until(lambda: drafts.describe() == "waiting for recordings", "the checkpoint, behind the version")
        assert (NAME, "load") in spans

        await drafts.leave_gpus(alerts.check)
        await until(lambda: drafts.describe() == "held", "the hold")
        record(run_dir, 1)
        drafts.loaded(2)  # a run that is loaded again meanwhile does not end the trainer's turn
        await until(lambda: drafts.describe() == "held", "the hold again")
        assert (drafts.active, engine.loads) == (1, [1])
        await drafts.return_to_gpus()
        await until(lambda: drafts.active == 2, "version 2")

        await first.lose()
        await until(lambda: drafts.describe() == "", "the loss")
        assert drafts.take_metrics()["draft/version"] == 2, "engines have it still"
        second = DraftTrainer(registry)
        await second.start("second")
        await until(lambda: caplog.messages.count("draft version 2 is active") == 2, "what it goes on from")
        told = alerts.take_warnings()
        assert not any("is back" in text for text in told), "it may fail as before: nothing is learned yet"
        record(run_dir, 2)
        await until(lambda: drafts.active == 3, "version 3")
        await until(lambda: engine.version == 3, "the engine")
        warnings = "\n".join([*told, *alerts.take_warnings()])
        assert f"{NAME} is lost, and the run goes on with the draft that it has" in warnings
        assert f"{NAME} is back, and goes on" in warnings
        assert warnings.count("is lost") == 1
        assert drafts.take_metrics()["draft/missed_recordings"] == 0
        alerts.check()
        await drafts.close()
        await second.lose()
    await subscriber.close()
    weightsync.close()


@contextlib.asynccontextmanager
async def run_of(
    config: JobConfig, host: Host, redis_url: str, job_id: str = "job"
) -> AsyncIterator[tuple[RunDrafts, RunAlerts, WorkerRegistry]]:
    """The run's part, with nothing attached but the weight-sync service, and no engine."""
    registry, alerts = WorkerRegistry(), RunAlerts(ChangeSignal())
    context = JobContext(job_id, config, redis_url, pathlib.Path(config.services.run_dir))
    service = registry.attach(
        controller_pb2.WorkerRegistration(
            worker_id="weightsync", kind=controller_pb2.WORKER_KIND_WEIGHTSYNC, address=host.address
        )
    )
    weightsync, activities = WeightSyncClient(service), WorkerActivities(lambda *_: None)
    async with await connect_async(redis_url) as client:
        queue = GroupQueue(client, job_id, consumer="test")
        acceptance, rewards = RunAcceptance.of_job(config, ()), RewardAddresses({})
        rollouts = RolloutWorkers(context, registry, queue, alerts, host.address, rewards, acceptance)
        drafts = RunDrafts(context, registry, weightsync, rollouts, alerts, activities)
        yield drafts, alerts, registry
        await drafts.close()
    weightsync.close()


async def test_a_draft_trainer_loads_in_the_engines_turn_alone_and_goes_on_after_a_broken_connection(
    tmp_path: pathlib.Path, host: Host, redis_url: str
) -> None:
    async with run_of(draft_config(write_dense_model(tmp_path / "model")), host, redis_url) as (
        drafts,
        alerts,
        attached,
    ):
        drafts.begin()
        drafts.loaded(0)
        first = DraftTrainer(attached)
        first.may_load.clear()
        await first.start("first")
        await until(lambda: first.is_loading, "the load")
        turn = asyncio.create_task(drafts.leave_gpus(alerts.check))
        await asyncio.sleep(0)  # it waits
        assert not turn.done()
        first.may_load.set()
        await turn
        assert drafts.describe() == "held", "it had to be loaded, and to leave, first"

        await first.disconnect()
        await until(lambda: drafts.describe() == "", "the loss")
        await first.start("first")  # the same process
        await drafts.return_to_gpus()  # is not told, as nobody is followed
        await until(lambda: drafts.describe() == "waiting for recordings", "the end of a hold that was not ended")
        await first.lose()


async def test_a_draft_trainer_that_works_for_another_run_is_passed_over(
    tmp_path: pathlib.Path, host: Host, redis_url: str
) -> None:
    model = write_dense_model(tmp_path / "model")
    others = draft_config(model, run_dir=str(tmp_path / "other"))
    async with (
        run_of(others, host, redis_url, "other") as (other, _, other_registry),
        run_of(draft_config(model), host, redis_url) as (drafts, alerts, registry),
    ):
        busy, idle = DraftTrainer(other_registry), DraftTrainer(registry, "draft-trainer-1")
        await busy.start("busy")
        other.begin()
        await until(lambda: other.describe() != "", "the other run")
        registry.attach(busy.worker.registration)
        await idle.start("idle")
        drafts.begin()
        await until(lambda: drafts.describe() != "", "the idle draft trainer")
        assert idle.is_loading
        assert alerts.take_warnings() == [], "nothing is wrong"
        await busy.lose()
        await idle.lose()
