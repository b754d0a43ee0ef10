"""The controller's client of the trainer."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterable, Coroutine, Sequence
from typing import Any, TypeVar

from miles.rpc import connect
from miles.rpc.gen import policy_pb2, trainer_pb2, trainer_pb2_grpc
from miles.services.controller.clients import deadlines
from miles.services.controller.clients.calls import WorkerFailedError, WorkerLostError, call, stream
from miles.services.controller.jobs.context import JobContext
from miles.services.controller.workers.registry import AttachedWorker
from miles.tasks import cancelled_at_end

logger = logging.getLogger(__name__)
T = TypeVar("T")


class StepAbandonedError(WorkerLostError):
    """The trainer abandoned a step, on request, before it had changed anything."""


class TrainerClient:
    """Calls to one job's trainer. They end with WorkerLostError when its worker lease ends."""

    def __init__(self, worker: AttachedWorker, context: JobContext, weightsync_address: str) -> None:
        self._worker = worker
        self._context = context
        self._weightsync_address = weightsync_address
        self._channel = connect(worker.registration.address)
        self._stub = trainer_pb2_grpc.TrainerServiceStub(self._channel)
        self.stage = ""
        """What the trainer said last of what it loads or trains."""
        self.loading_since_s: float | None = None
        """When it was asked to load the job, in seconds since the Unix epoch; None while it does not load."""

    @property
    def worker_id(self) -> str:
        return self._worker.worker_id

    @property
    def lost(self) -> bool:
        """Whether the trainer's worker lease has ended."""
        return self._worker.lost.is_set()

    async def aclose(self) -> None:
        await self._channel.close()

    async def _while_alive(self, work: Coroutine[Any, Any, T], what: str) -> T:
        """Return the result of `work`, unless the worker lease ends first: a hung process keeps its connections."""
        task = asyncio.create_task(work)
        lost = asyncio.create_task(self._worker.lost.wait())
        async with cancelled_at_end(task, lost):
            await asyncio.wait({task, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise WorkerLostError(f"{what}: the trainer's worker lease has ended")
            try:
                return task.result()
            except WorkerFailedError as error:
                if self.lost:  # a new process may listen at its address by now, which does not know the job
                    raise WorkerLostError(f"{what}: the trainer's worker lease has ended ({error})") from error
                raise

    async def start_job(self) -> trainer_pb2.TrainerReady:
        """Build the model and load the newest checkpoint."""
        return await self._while_alive(self._start_job(), "trainer start")

    async def _start_job(self) -> trainer_pb2.TrainerReady:
        request = trainer_pb2.TrainerStartJobRequest(
            job_id=self._context.job_id,
            config_json=self._context.config_json,
            redis_url=self._context.redis_url,
            weightsync_address=self._weightsync_address,
            run_dir=str(self._context.run_dir),
            data_json=json.dumps(self._context.data),
        )
        messages: AsyncIterable[trainer_pb2.TrainerStartJobResponse] = self._stub.StartJob(request)
        self.stage, self.loading_since_s = "", time.time()
        async for message in stream(messages, "trainer start", deadlines.START_JOB_SILENCE_S):
            if message.HasField("ready"):
                self.loading_since_s = None
                return message.ready
            logger.info("trainer: %s", message.stage)
            self.stage = message.stage
        raise WorkerLostError("trainer start: the stream ended before the trainer was ready")

    async def train(
        self, step: int, group_ids: Sequence[int] = (), dropped: Sequence[int] = ()
    ) -> trainer_pb2.TrainDone:
        """Take one training step; a step that was taken before only returns its metrics.

        Raises StepAbandonedError when `abandon` stopped it.
        """
        return await self._while_alive(self._train(step, group_ids, dropped), f"training step {step}")

    async def _train(self, step: int, group_ids: Sequence[int], dropped: Sequence[int]) -> trainer_pb2.TrainDone:
        request = trainer_pb2.TrainRequest(
            job_id=self._context.job_id,
            step=step,
            group_ids=group_ids,
            dropped_group_ids=dropped,
            deadline_ms=int(deadlines.GROUPS_IN_QUEUE_S * 1000),
        )
        messages: AsyncIterable[trainer_pb2.TrainResponse] = self._stub.Train(request)
        self.stage = ""
        async for message in stream(messages, f"training step {step}", deadlines.TRAIN_SILENCE_S):
            if message.HasField("done"):
                return message.done
            if message.phase == trainer_pb2.TRAIN_PHASE_ABANDONED:
                raise StepAbandonedError(f"training step {step} was abandoned")
            self.stage = _words(message)
        raise WorkerLostError(f"training step {step}: the stream ended before the step was done")

    async def abandon(self, step: int) -> bool:
        """Abandon a training step that has changed nothing yet; return False when it is too late for that."""
        request = trainer_pb2.AbandonStepRequest(job_id=self._context.job_id, step=step)
        what = f"abandoning training step {step}"
        asked = call(self._stub.AbandonStep(request), what, deadlines.ABANDON_S)
        response: trainer_pb2.AbandonStepResponse = await self._while_alive(asked, what)
        return response.abandoning

    async def export(self, version: int) -> trainer_pb2.ExportResponse:
        """Prepare the weights as a version."""
        request = trainer_pb2.ExportRequest(
            job_id=self._context.job_id, stream=policy_pb2.WEIGHT_STREAM_POLICY, version=version
        )
        what = f"export of version {version}"
        return await self._while_alive(call(self._stub.Export(request), what, deadlines.EXPORT_S), what)

    async def release_memory(self, *, state: bool) -> trainer_pb2.TrainerReleaseMemoryResponse:
        """Have the trainer free what it keeps for the next step on GPUs; with `state`, all until a call needs it."""
        request = trainer_pb2.TrainerReleaseMemoryRequest(job_id=self._context.job_id, state=state)
        what = "the trainer's memory"
        releasing = call(self._stub.ReleaseMemory(request), what, deadlines.RELEASE_MEMORY_S)
        return await self._while_alive(releasing, what)

    async def save(self, export_hf: bool, in_background: bool) -> trainer_pb2.SaveCheckpointResponse:
        """Write a checkpoint; one in the background is complete once the answer to a later call names it."""
        request = trainer_pb2.SaveCheckpointRequest(
            job_id=self._context.job_id, export_hf=export_hf, in_background=in_background
        )
        saving = call(self._stub.SaveCheckpoint(request), "checkpoint", deadlines.CHECKPOINT_S)
        return await self._while_alive(saving, "checkpoint")


_PHASES = {
    trainer_pb2.TRAIN_PHASE_WAITING: "waiting for the step's groups to appear in the queue",
    trainer_pb2.TRAIN_PHASE_LOG_PROBS: "computing log-probs",
    trainer_pb2.TRAIN_PHASE_FORWARD_BACKWARD: "forward and backward passes",
    trainer_pb2.TRAIN_PHASE_OPTIMIZER: "updating the parameters",
}


def _words(progress: trainer_pb2.TrainResponse) -> str:
    phase = _PHASES.get(progress.phase, "")
    if not progress.micro_batches:
        return phase
    return f"{phase}, {progress.micro_batches_done} of {progress.micro_batches} micro-batches done"
