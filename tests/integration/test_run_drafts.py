"""The run's part of draft training: a real draft trainer, a real weight-sync service and an engine that follows it."""

from __future__ import annotations

import asyncio
import functools
import pathlib
import time
from collections.abc import AsyncIterator, Callable

import grpc.aio
import pytest
from draft_trainer_process import draft_config, record
from trainer_cases import write_dense_model
from weight_host import DRAFT, GatedEngine, Host

from miles.change_signal import ChangeSignal
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
from miles.services.trainer.drafts.loading import load_job
from miles.services.trainer.drafts.service import SERVICE_NAME, DraftTrainerServicer
from miles.weights import WeightSubscriber

DEADLINE_S = 200.0
NAME = "draft-trainer-0"


class DraftTrainer:
    """The service in this process, attached to a registry."""

    def __init__(self, registry: WorkerRegistry) -> None:
        self._registry = registry
        self._servicer = DraftTrainerServicer(functools.partial(load_job, device_name="cpu"))
        self._server: grpc.aio.Server
        self.worker: AttachedWorker

    async def start(self, incarnation: str) -> None:
        self._server, address = await start_server(
            lambda server: draft_trainer_pb2_grpc.add_DraftTrainerServiceServicer_to_server(self._servicer, server),
            "127.0.0.1:0",
            [SERVICE_NAME],
        )
        registration = controller_pb2.WorkerRegistration(
            worker_id=NAME,
            kind=controller_pb2.WORKER_KIND_DRAFT_TRAINER,
            address=address,
            incarnation=incarnation,
            num_gpus=1,  # as one that has to leave its GPU
        )
        self.worker = self._registry.attach(registration)

    async def lose(self) -> None:
        """End as a process does whose connections break."""
        await self._server.stop(None)
        self._registry.detach(self.worker)
        await self._servicer.close()


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
    tmp_path: pathlib.Path, host: Host, redis_url: str
) -> None:
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
        assert drafts.describe() == "waiting for recordings"
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
        record(run_dir, 2)
        await until(lambda: drafts.active == 3, "version 3")
        await until(lambda: engine.version == 3, "the engine")
        warnings = "\n".join(alerts.take_warnings())
        assert f"{NAME} is lost, and the run goes on with the draft that it has" in warnings
        assert f"{NAME} is back, and goes on" in warnings
        assert warnings.count("is lost") == 1
        assert drafts.take_metrics()["draft/missed_recordings"] == 0
        alerts.check()
        await drafts.close()
        await second.lose()
    await subscriber.close()
    weightsync.close()
