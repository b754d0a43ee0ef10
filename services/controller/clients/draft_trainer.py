"""The controller's client of the draft trainer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator

from miles.rpc import connect
from miles.rpc.gen import draft_trainer_pb2, draft_trainer_pb2_grpc
from miles.services.controller.clients import deadlines
from miles.services.controller.clients.calls import WorkerLostError, call, stream
from miles.services.controller.jobs.context import JobContext
from miles.services.controller.workers.registry import AttachedWorker
from miles.tasks import cancelled_at_end

logger = logging.getLogger(__name__)


class DraftTrainerClient:
    """Calls to one job's draft trainer; they raise WorkerLostError or WorkerFailedError."""

    def __init__(self, worker: AttachedWorker, context: JobContext, weightsync_address: str) -> None:
        self.worker = worker
        self.worker_id = worker.worker_id
        self._context = context
        self._weightsync_address = weightsync_address
        self._channel = connect(worker.registration.address)
        self._stub = draft_trainer_pb2_grpc.DraftTrainerServiceStub(self._channel)

    @property
    def has_gpu(self) -> bool:
        """Whether it computes on a GPU."""
        return self.worker.registration.num_gpus > 0

    async def aclose(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def start_job(self, policy_step: int | None) -> None:
        """Load the draft model, or publish again what is loaded.

        `policy_step`: training steps that the policy has taken; None when that is not known yet.
        """
        request = draft_trainer_pb2.DraftTrainerStartJobRequest(
            job_id=self._context.job_id,
            config_json=self._context.config_json,
            weightsync_address=self._weightsync_address,
            run_dir=str(self._context.run_dir),
            policy_step=policy_step,
        )
        async for message in stream(self._stub.StartJob(request), "draft trainer start", deadlines.START_JOB_SILENCE_S):
            logger.info("draft trainer: %s", message.stage)
            if message.ready:
                return
        raise WorkerLostError("draft trainer start: the stream ended before it was ready")

    async def watch(self) -> AsyncGenerator[draft_trainer_pb2.WatchDraftsResponse, None]:
        """Follow the training until it ends, or until the worker lease does: a hung process keeps its connections."""
        request = draft_trainer_pb2.WatchDraftsRequest(job_id=self._context.job_id)
        call_ = self._stub.Watch(request)
        lost = asyncio.create_task(self.worker.lost.wait())
        lost.add_done_callback(lambda _: call_.cancel())
        async with cancelled_at_end(lost):
            try:
                async for message in stream(call_, "draft training", deadlines.WATCH_DRAFTS_SILENCE_S):
                    yield message
            except asyncio.CancelledError:  # of the call above, unless somebody cancels this task
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    raise
                raise WorkerLostError("draft training: its worker lease has ended") from None

    async def hold(self, *, release_memory: bool) -> int:
        """Stop the training between two optimizer steps; return the device memory that is freed, in bytes."""
        request = draft_trainer_pb2.HoldDraftsRequest(
            job_id=self._context.job_id, hold=True, release_memory=release_memory
        )
        answer = await call(self._stub.Hold(request), "holding the draft trainer", deadlines.HOLD_DRAFTS_S)
        return int(answer.released_bytes)

    async def go_on(self) -> None:
        """End a hold."""
        request = draft_trainer_pb2.HoldDraftsRequest(job_id=self._context.job_id)
        await call(self._stub.Hold(request), "the draft trainer to go on", deadlines.HOLD_DRAFTS_S)
