"""Fake rollouts, trainer and weight sync, which only wait, for a real controller over real gRPC.

Each rollout has an address of its own, so that the controller has a connection for each; one server listens at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from benchmarks.simulation.step_gaps import Moments
from miles.addresses import split_address
from miles.rpc import connect, start_server
from miles.rpc.gen import (
    controller_pb2,
    controller_pb2_grpc,
    rollout_pb2,
    rollout_pb2_grpc,
    trainer_pb2,
    trainer_pb2_grpc,
    weightsync_pb2,
    weightsync_pb2_grpc,
)
from miles.tasks import cancelled_at_end

Context = Any


class Rollouts(rollout_pb2_grpc.RolloutServiceServicer):
    """Any number of rollouts: each Run stream is one of them."""

    def __init__(self, slots: int, group_s: float, moments: Moments) -> None:
        self._moments = moments
        self._slots = slots
        self._group_s = group_s
        self._random = random.Random(0)
        self.finished = 0
        """Groups, all rollouts together."""
        self.full = 0
        """Rollouts that have had as many groups as they hold at once."""
        self.lease_bytes = 0
        """Size of the first lease."""
        self.asked = asyncio.Event()
        """Set once a rollout was asked to load the job."""

    async def StartJob(
        self, request: rollout_pb2.RolloutStartJobRequest, context: Context
    ) -> AsyncIterator[rollout_pb2.RolloutStartJobResponse]:
        self.asked.set()
        yield rollout_pb2.RolloutStartJobResponse(stage="ready", ready=True)

    async def StopJob(
        self, request: rollout_pb2.RolloutStopJobRequest, context: Context
    ) -> rollout_pb2.RolloutStopJobResponse:
        return rollout_pb2.RolloutStopJobResponse()

    async def Run(self, requests: AsyncIterator[rollout_pb2.RunRequest], context: Context) -> None:  # type: ignore[override]
        loop = asyncio.get_running_loop()
        outgoing: asyncio.Queue[rollout_pb2.RunResponse] = asyncio.Queue()
        opening = (await anext(aiter(requests))).open
        number, progress_s = opening.lease_number, opening.progress_interval_ms / 1000

        def finish(group_id: int, attempt: int, version: int) -> None:
            self.finished += 1
            self._moments.note("finished")
            finished = rollout_pb2.GroupFinished(
                group_id=group_id,
                attempt=attempt,
                purpose=rollout_pb2.GROUP_PURPOSE_TRAIN,
                verdict=rollout_pb2.FILTER_VERDICT_KEEP,
                entry_id="0-1",
                oldest_version=version,
            )
            outgoing.put_nowait(rollout_pb2.RunResponse(lease_number=number, finished=finished))

        async def read() -> None:
            leases = 0
            async for request in requests:
                for lease in request.leases.leases:
                    self._moments.note("leased")
                    leases += 1
                    self.lease_bytes = self.lease_bytes or lease.ByteSize()
                    self.full += leases == self._slots
                    # The first ones are under way already, so that from the beginning some end at any time.
                    seconds = self._group_s * (self._random.random() if leases <= self._slots else 1)
                    loop.call_later(seconds, finish, lease.group_id, lease.attempt, lease.min_version)

        async def report() -> None:
            for count in itertools.count():
                progress = rollout_pb2.RunProgress(running_requests=self._slots, generated_tokens=count)
                outgoing.put_nowait(rollout_pb2.RunResponse(lease_number=number, progress=progress))
                await asyncio.sleep(progress_s)

        ready = rollout_pb2.RunReady(capacity_groups=self._slots)
        outgoing.put_nowait(rollout_pb2.RunResponse(lease_number=number, ready=ready))
        tasks = [asyncio.create_task(read()), asyncio.create_task(report())]
        try:
            while True:
                several = [await outgoing.get()]
                while not outgoing.empty():
                    several.append(outgoing.get_nowait())
                responses = rollout_pb2.RunResponses(responses=several)
                await context.write(rollout_pb2.RunResponse(lease_number=number, several=responses))
        finally:
            for task in tasks:
                task.cancel()


class Trainer(trainer_pb2_grpc.TrainerServiceServicer):
    """Takes steps of a fixed time."""

    def __init__(self, train_s: float, moments: Moments) -> None:
        self._train_s = train_s
        self._moments = moments

    async def StartJob(
        self, request: trainer_pb2.TrainerStartJobRequest, context: Context
    ) -> AsyncIterator[trainer_pb2.TrainerStartJobResponse]:
        yield trainer_pb2.TrainerStartJobResponse(stage="ready", ready=trainer_pb2.TrainerReady())

    async def Train(
        self, request: trainer_pb2.TrainRequest, context: Context
    ) -> AsyncIterator[trainer_pb2.TrainResponse]:
        self._moments.note("train")
        await asyncio.sleep(self._train_s)
        done = trainer_pb2.TrainDone(
            step=request.step, metrics={"rollout/response_tokens": float(len(request.group_ids))}
        )
        self._moments.note("trained")
        yield trainer_pb2.TrainResponse(phase=trainer_pb2.TRAIN_PHASE_DONE, done=done)

    async def AbandonStep(
        self, request: trainer_pb2.AbandonStepRequest, context: Context
    ) -> trainer_pb2.AbandonStepResponse:
        return trainer_pb2.AbandonStepResponse(abandoning=False)

    async def Export(self, request: trainer_pb2.ExportRequest, context: Context) -> trainer_pb2.ExportResponse:
        self._moments.note("export")
        self._moments.note("exported")
        return trainer_pb2.ExportResponse(total_bytes=1)

    async def SaveCheckpoint(
        self, request: trainer_pb2.SaveCheckpointRequest, context: Context
    ) -> trainer_pb2.SaveCheckpointResponse:
        return trainer_pb2.SaveCheckpointResponse(checkpoint_dir="nowhere")

    async def StopJob(
        self, request: trainer_pb2.TrainerStopJobRequest, context: Context
    ) -> trainer_pb2.TrainerStopJobResponse:
        return trainer_pb2.TrainerStopJobResponse()


class WeightSync(weightsync_pb2_grpc.WeightSyncServiceServicer):
    """Brings every version to every engine at once."""

    def __init__(self, moments: Moments) -> None:
        self._moments = moments

    async def Activate(
        self, request: weightsync_pb2.ActivateRequest, context: Context
    ) -> AsyncIterator[weightsync_pb2.ActivateResponse]:
        self._moments.note("activate")
        self._moments.note("active")
        yield weightsync_pb2.ActivateResponse(done=weightsync_pb2.ActivateDone(engines=len(request.wait_for)))

    async def ReleaseJob(
        self, request: weightsync_pb2.ReleaseJobRequest, context: Context
    ) -> weightsync_pb2.ReleaseJobResponse:
        return weightsync_pb2.ReleaseJobResponse()


@contextlib.asynccontextmanager
async def stand_ins(
    controller: str, rollouts: int, service: Rollouts, trainer: Trainer, weightsync: WeightSync
) -> AsyncIterator[None]:
    """All of them, attached to a controller."""

    def register(server: grpc.aio.Server) -> None:
        rollout_pb2_grpc.add_RolloutServiceServicer_to_server(service, server)
        trainer_pb2_grpc.add_TrainerServiceServicer_to_server(trainer, server)
        weightsync_pb2_grpc.add_WeightSyncServiceServicer_to_server(weightsync, server)

    server, address = await start_server(register, "0.0.0.0:0", [], bandwidth_probes=False)
    port = split_address(address)[1]
    kinds = {
        "weightsync": controller_pb2.WORKER_KIND_WEIGHTSYNC,
        "reward-0": controller_pb2.WORKER_KIND_REWARD,
        **{f"rollout-{i:05d}": controller_pb2.WORKER_KIND_ROLLOUT for i in range(rollouts)},
        "trainer-0": controller_pb2.WORKER_KIND_TRAINER,
    }
    async with connect(controller) as channel:
        stub = controller_pb2_grpc.ControllerServiceStub(channel)
        tasks = [
            asyncio.create_task(_attach(stub, name, kind, loopback_address(place, port)))
            for place, (name, kind) in enumerate(kinds.items())
        ]
        try:
            async with cancelled_at_end(*tasks):
                yield
        finally:
            await server.stop(0)


def loopback_address(place: int, port: int) -> str:
    """The address of one of up to 65,000 servers on this machine."""
    return f"127.1.{place // 250}.{place % 250 + 1}:{port}"


async def _attach(
    stub: controller_pb2_grpc.ControllerServiceStub,
    name: str,
    kind: controller_pb2.WorkerKind.ValueType,
    address: str,
) -> None:
    registration = controller_pb2.WorkerRegistration(
        worker_id=name,
        kind=kind,
        address=address,
        incarnation=uuid.uuid4().hex,
        info_json='{"ranks": 1, "rewards": "exact_match"}',
    )

    interval_s = 2.0

    async def requests() -> AsyncIterator[controller_pb2.AttachRequest]:
        yield controller_pb2.AttachRequest(registration=registration)
        for sequence in itertools.count():
            beat = controller_pb2.WorkerHeartbeat(sequence=sequence, activity="generating", progress=sequence)
            yield controller_pb2.AttachRequest(heartbeat=beat)
            await asyncio.sleep(interval_s)

    while True:
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for response in stub.Attach(requests()):
                interval_s = response.heartbeat_interval_ms / 1000
        await asyncio.sleep(0.5)
