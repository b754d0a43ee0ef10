"""Keeps a job connected to every live rollout worker."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from miles.queue.backpressure import TRANSIENT
from miles.rpc.gen import controller_pb2, rollout_pb2
from miles.services.controller.clients import deadlines
from miles.services.controller.clients.calls import WorkerFailedError, WorkerLostError
from miles.services.controller.clients.protocols import RolloutListener
from miles.services.controller.clients.rollout import RolloutClient
from miles.services.controller.jobs import number_types
from miles.services.controller.jobs.context import JobContext
from miles.services.controller.run.alerts import RunAlerts
from miles.services.controller.run.refusals import Refusals
from miles.services.controller.run.set_fences import fence_earlier_leases, fence_lost_worker
from miles.services.controller.speculation.acceptance import RunAcceptance
from miles.services.controller.workers.registry import AttachedWorker, WorkerRegistry
from miles.services.controller.workers.report_intervals import report_interval_s
from miles.services.controller.workers.reward_addresses import RewardAddresses
from miles.tasks import cancel, cancelled_at_end

if TYPE_CHECKING:
    from miles.queue import GroupQueue

logger = logging.getLogger(__name__)


class RolloutWorkers:
    """The rollout workers of a job: connected when they attach, fenced when they are lost."""

    def __init__(
        self,
        context: JobContext,
        registry: WorkerRegistry,
        queue: GroupQueue,
        alerts: RunAlerts,
        weightsync_address: str,
        reward_addresses: RewardAddresses,
        acceptance: RunAcceptance,
    ) -> None:
        self._context = context
        self._registry = registry
        self._queue = queue
        self._alerts = alerts
        self._weightsync_address = weightsync_address
        self._reward_addresses = reward_addresses
        self._acceptance = acceptance
        self._clients: dict[str, RolloutClient] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._generated_by_lost = 0
        self._refusals = Refusals()
        self._refusing: set[str] = set()
        """Workers that refuse the weights, by name."""
        self.may_load = asyncio.Event()
        """Set while workers may load the job; others wait."""
        self.may_load.set()

    @property
    def generated_tokens(self) -> int:
        """Response tokens that all workers have generated, lost ones included."""
        return self._generated_by_lost + sum(client.progress.generated_tokens for client in self._clients.values())

    def all(self) -> list[RolloutClient]:
        """Return the clients of all workers, also of those that are loading the job."""
        return list(self._clients.values())

    def connected(self) -> list[RolloutClient]:
        """Return the clients of workers that have loaded the job, by name."""
        return sorted((client for client in self.all() if client.connected), key=lambda client: client.worker_id)

    def get(self, worker_id: str) -> RolloutClient | None:
        """Return a worker's client."""
        return self._clients.get(worker_id)

    def check(self) -> None:
        """Raise WeightsRefusedError when no worker is left whose engine could take the trainer's weights."""
        if len(self._refusing) == len(self._clients):  # asked after every group: not of each worker while one serves
            self._refusals.check({c.worker_id: c.out_of_routing for c in self.all()}, time.monotonic())

    async def run(self, listener: RolloutListener) -> None:
        """Connect to all live rollouts, and to those that attach later, until cancelled."""
        fences: set[asyncio.Task[None]] = set()
        try:
            while True:
                attached = self._registry.alive(controller_pb2.WORKER_KIND_ROLLOUT)
                if new := [worker for worker in attached if worker.worker_id not in self._tasks]:
                    fenced = asyncio.create_task(fence_earlier_leases(self._queue, new))
                    fences.add(fenced)
                    fenced.add_done_callback(fences.discard)
                    for worker in new:
                        task = asyncio.create_task(self._serve(worker, fenced, listener))
                        self._tasks[worker.worker_id] = task
                        self._alerts.watch(task)
                await self._registry.wait_for_change(1.0)
        finally:
            await cancel(*self._tasks.values(), *fences)

    async def _serve(self, worker: AttachedWorker, fenced: asyncio.Future[None], listener: RolloutListener) -> None:
        """Work with one worker, from when it is `fenced` until its worker lease or its stream ends."""
        addresses = self._reward_addresses.of(worker.worker_id)
        client = self._clients[worker.worker_id] = RolloutClient(
            worker, self._context, self._weightsync_address, addresses, report_interval_s(len(self._tasks), 1.0)
        )
        if warning := number_types.warning_of(worker, self._context.config.rollout.rollout_dtype):
            self._alerts.warn(warning)
        try:
            await asyncio.shield(fenced)
            if not self.may_load.is_set():
                logger.info("%s waits for the trainer to leave the GPUs", worker.worker_id)
                await self.may_load.wait()
            client.loading_since_s = time.time()
            await self._run_until_lost(client, listener)
            if worker.lost.is_set():
                await fence_lost_worker(self._queue, worker)
        except WorkerFailedError as error:
            self._alerts.fail(error)
        except TRANSIENT as error:
            self._alerts.fail(WorkerFailedError(f"Redis was away for {deadlines.FENCE_S:g} s: {error}"))
        finally:
            self._generated_by_lost += client.progress.generated_tokens
            self._refusing.discard(worker.worker_id)
            del self._clients[worker.worker_id], self._tasks[worker.worker_id]
            if not client.refused_weights:
                self._refusals.lost(worker.worker_id, time.monotonic())
            self._acceptance.lose(worker.worker_id)
            listener.on_lost(client)

    async def _run_until_lost(self, client: RolloutClient, listener: RolloutListener) -> None:
        lost = asyncio.create_task(client.worker.lost.wait())
        told = ""

        def on_response(client: RolloutClient, response: rollout_pb2.RunResponse) -> None:
            nonlocal told
            (self._refusing.add if client.refused_weights else self._refusing.discard)(client.worker_id)
            if client.refused_weights and client.out_of_routing != told:
                told = client.out_of_routing
                self._alerts.warn(
                    f"{client.worker_id} cannot take the weights and is out of the run until it is restarted: {told}"
                )
            if response.HasField("progress") and response.progress.HasField("speculation"):
                incarnation = client.worker.registration.incarnation
                self._acceptance.note(client.worker_id, incarnation, response.progress.speculation)
            listener.on_response(client, response)

        serving = asyncio.create_task(client.run_job(on_response))
        try:
            async with cancelled_at_end(lost, serving):
                await asyncio.wait({lost, serving}, return_when=asyncio.FIRST_COMPLETED)
                if serving.done():
                    serving.result()
        except WorkerLostError as error:
            logger.info("lost rollout %s: %s", client.worker_id, error)
            self._alerts.warn(f"rollout {client.worker_id} lost: {error}")
        finally:
            listener.on_disconnected(client)
