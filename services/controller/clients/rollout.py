"""The controller's client of a rollout worker."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable

from miles.rpc import connected
from miles.rpc.gen import rollout_pb2, rollout_pb2_grpc
from miles.services.controller.clients import deadlines
from miles.services.controller.clients.calls import call, stream
from miles.services.controller.clients.orders import Orders
from miles.services.controller.jobs.context import JobContext
from miles.services.controller.workers.registry import AttachedWorker

logger = logging.getLogger(__name__)


class RolloutClient:
    """One rollout worker's part in a job: group leases out, results in."""

    def __init__(
        self,
        worker: AttachedWorker,
        context: JobContext,
        weightsync_address: str,
        reward_addresses: dict[str, str],
        progress_interval_s: float,
    ) -> None:
        """`progress_interval_s`: how often the worker is to report."""
        self.worker = worker
        self.worker_id = worker.worker_id
        self.capacity = 0
        """Groups the worker can usefully run at once; 0 while it has no weights or is out of routing."""
        self.connected = False
        """Whether the worker has loaded the job and its work stream is open."""
        self.out_of_routing = ""
        """Why the engine serves nothing; empty while it serves, and before its first weights."""
        self.refused_weights = False
        """Whether that is because its model cannot take the trainer's weights."""
        self.stage = ""
        """What the worker said last while it loads the job."""
        self.loading_since_s: float | None = None
        """When it was asked to load the job, in seconds since the Unix epoch; None while it does not load."""
        self.progress = rollout_pb2.RunProgress()
        self._context = context
        self._weightsync_address = weightsync_address
        self.reward_addresses = reward_addresses
        self._progress_interval_s = progress_interval_s
        self._orders = Orders()

    async def run_job(self, on_response: Callable[[RolloutClient, rollout_pb2.RunResponse], None]) -> None:
        """Start the job on the worker and pass on its responses, until the stream ends or breaks."""
        with connected(self.worker.registration.address) as channel:
            stub = rollout_pb2_grpc.RolloutServiceStub(channel)
            what = f"rollout {self.worker_id}"
            await self._start_job(stub, what)
            run = stub.Run(self._requests())
            try:
                async for message in stream(run, what, deadlines.PROGRESS_SILENCE_S):
                    if message.lease_number != self.worker.lease_number:
                        continue
                    for response in message.several.responses or (message,):
                        self._note(response)
                        on_response(self, response)
            finally:
                run.cancel()
                self.connected, self.capacity = False, 0

    def _note(self, response: rollout_pb2.RunResponse) -> None:
        kind = response.WhichOneof("kind")
        if kind == "ready":
            self.connected = True
            self.capacity = response.ready.capacity_groups
            self.out_of_routing = response.ready.out_of_routing
            self.refused_weights = response.ready.refused_weights
        elif kind == "progress":
            self.progress = response.progress

    async def _requests(self) -> AsyncIterator[rollout_pb2.RunRequest]:
        opening = rollout_pb2.RunOpen(
            job_id=self._context.job_id,
            lease_number=self.worker.lease_number,
            progress_interval_ms=int(self._progress_interval_s * 1000),
            takes_several=True,
        )
        yield rollout_pb2.RunRequest(open=opening)
        while True:
            yield await self._orders.next()

    async def _start_job(self, stub: rollout_pb2_grpc.RolloutServiceStub, what: str) -> None:
        request = rollout_pb2.RolloutStartJobRequest(
            job_id=self._context.job_id,
            config_json=self._context.config_json,
            redis_url=self._context.redis_url,
            weightsync_address=self._weightsync_address,
            reward_addresses=self.reward_addresses,
        )
        self.stage, self.loading_since_s = "", time.time()
        async for message in stream(stub.StartJob(request), f"{what} start", deadlines.START_JOB_SILENCE_S):
            logger.info("%s: %s", what, message.stage)
            self.stage = message.stage
        self.loading_since_s = None

    def lease(self, lease: rollout_pb2.GroupLease) -> None:
        """Lease a group to the worker."""
        self._orders.add(lease)

    def preempt(self, group_id: int, attempt: int, purpose: rollout_pb2.GroupPurpose.ValueType) -> None:
        """Preempt a group on the worker, which stores its unfinished responses and returns the group."""
        self._orders.add(rollout_pb2.GroupPreempt(group_id=group_id, attempt=attempt, purpose=purpose))

    async def release_memory(self) -> rollout_pb2.ReleaseMemoryResponse:
        """Free the memory of the worker's engine until it gets new weights."""
        with connected(self.worker.registration.address) as channel:
            stub = rollout_pb2_grpc.RolloutServiceStub(channel)
            request = rollout_pb2.ReleaseMemoryRequest(job_id=self._context.job_id)
            what = f"rollout {self.worker_id} memory"
            return await call(stub.ReleaseMemory(request), what, deadlines.RELEASE_MEMORY_S)
