"""The controller's side of the trainer and of weight sync."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterable, Coroutine, Sequence
from typing import Any, TypeVar

from miles.rpc import connect
from miles.rpc.gen import policy_pb2, trainer_pb2, trainer_pb2_grpc, weightsync_pb2, weightsync_pb2_grpc
from miles.services.controller.clients import deadlines
from miles.services.controller.clients.calls import WorkerFailedError, WorkerLostError, call, stream
from miles.services.controller.jobs.context import JobContext
from miles.services.controller.workers.registry import AttachedWorker

logger = logging.getLogger(__name__)
T = TypeVar("T")


class StepAbandonedError(WorkerLostError):
    """The trainer left a step that had changed nothing yet, as it was asked to."""


class TrainerLink:
    """One job's trainer."""

    def __init__(self, worker: AttachedWorker, context: JobContext, weightsync_address: str) -> None:
        self._worker = worker
        self._context = context
        self._weightsync_address = weightsync_address
        self._channel = connect(worker.registration.address)
        self._stub = trainer_pb2_grpc.TrainerServiceStub(self._channel)

    @property
    def worker_id(self) -> str:
        return self._worker.worker_id

    @property
    def lost(self) -> bool:
        """Whether the trainer's lease is over."""
        return self._worker.lost.is_set()

    async def close(self) -> None:
        await self._channel.close()

    async def _while_alive(self, work: Coroutine[Any, Any, T], what: str) -> T:
        """The result of `work`, given up when the trainer's lease ends: a process that hangs keeps its connections."""
        task = asyncio.create_task(work)
        lost = asyncio.create_task(self._worker.lost.wait())
        try:
            await asyncio.wait({task, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise WorkerLostError(f"{what}: the trainer's lease is over")
            try:
                return task.result()
            except WorkerFailedError as error:
                if self.lost:  # another process may listen at its address by now, which knows nothing of the job
                    raise WorkerLostError(f"{what}: the trainer's lease is over ({error})") from error
                raise
        finally:
            for each in (task, lost):
                each.cancel()
            await asyncio.gather(task, lost, return_exceptions=True)

    async def start_job(self) -> trainer_pb2.TrainerReady:
        """Have the model built and the newest checkpoint loaded."""
        return await self._while_alive(self._start_job(), "trainer start")

    async def _start_job(self) -> trainer_pb2.TrainerReady:
        request = trainer_pb2.TrainerStartJobRequest(
            job_id=self._context.job_id,
            config_json=self._context.config_json,
            redis_url=self._context.redis_url,
            weightsync_address=self._weightsync_address,
            run_dir=str(self._context.run_dir),
        )
        messages: AsyncIterable[trainer_pb2.TrainerStartJobResponse] = self._stub.StartJob(request)
        async for message in stream(messages, "trainer start", deadlines.START_JOB_SILENCE_S):
            if message.HasField("ready"):
                return message.ready
            logger.info("trainer: %s", message.stage)
        raise WorkerLostError("trainer start: the stream ended before the trainer was ready")

    async def train(
        self, step: int, group_ids: Sequence[int] = (), dropped: Sequence[int] = ()
    ) -> trainer_pb2.TrainDone:
        """Take one training step; for one that was taken before, only answers with its metrics.

        Raises StepAbandonedError when `abandon` made the trainer leave it.
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
        async for message in stream(messages, f"training step {step}", deadlines.TRAIN_SILENCE_S):
            if message.HasField("done"):
                return message.done
            if message.phase == trainer_pb2.TRAIN_PHASE_ABANDONED:
                raise StepAbandonedError(f"training step {step} was abandoned")
        raise WorkerLostError(f"training step {step}: the stream ended before the step was done")

    async def abandon(self, step: int) -> bool:
        """Have a training step left as long as it has changed nothing; False when it is too late for that."""
        request = trainer_pb2.AbandonStepRequest(job_id=self._context.job_id, step=step)
        what = f"leaving training step {step}"
        asking = call(self._stub.AbandonStep(request), what, deadlines.ABANDON_S)
        response: trainer_pb2.AbandonStepResponse = await self._while_alive(asking, what)
        return response.abandoning

    async def export(self, version: int) -> trainer_pb2.ExportResponse:
        """Have the weights prepared as a version."""
        request = trainer_pb2.ExportRequest(
            job_id=self._context.job_id, stream=policy_pb2.WEIGHT_STREAM_POLICY, version=version
        )
        what = f"export of version {version}"
        return await self._while_alive(call(self._stub.Export(request), what, deadlines.EXPORT_S), what)

    async def save(self, export_hf: bool, in_background: bool) -> trainer_pb2.SaveCheckpointResponse:
        """Write a checkpoint; in the background it is complete when an answer to a later call names it."""
        request = trainer_pb2.SaveCheckpointRequest(
            job_id=self._context.job_id, export_hf=export_hf, in_background=in_background
        )
        saving = call(self._stub.SaveCheckpoint(request), "checkpoint", deadlines.CHECKPOINT_S)
        return await self._while_alive(saving, "checkpoint")

    async def stop_job(self) -> None:
        """Have everything of the job dropped."""
        request = trainer_pb2.TrainerStopJobRequest(job_id=self._context.job_id)
        await call(self._stub.StopJob(request), "trainer stop", deadlines.STOP_JOB_S)


async def release_weights(context: JobContext, weightsync_address: str) -> None:
    """Have every version of the job freed."""
    async with connect(weightsync_address) as channel:
        stub = weightsync_pb2_grpc.WeightSyncServiceStub(channel)
        request = weightsync_pb2.ReleaseJobRequest(job_id=context.job_id)
        await call(stub.ReleaseJob(request), "release of the job's weights", deadlines.STOP_JOB_S)


async def activate(
    context: JobContext, weightsync_address: str, version: int, min_engines: int, wait_for: Sequence[str]
) -> None:
    """Bring every engine to a prepared version, waiting for those named; `WorkerLostError` when too few got there."""
    request = weightsync_pb2.ActivateRequest(
        version=policy_pb2.WeightVersion(
            job_id=context.job_id, stream=policy_pb2.WEIGHT_STREAM_POLICY, version=version
        ),
        operation_id=uuid.uuid4().hex,
        deadline_ms=int(deadlines.ACTIVATE_S * 1000),
        min_engines=min_engines,
        wait_for=wait_for,
        check_equal=context.config.weights.check_weight_update_equal,
    )
    what = f"activation of version {version}"
    async with connect(weightsync_address) as channel:
        stub = weightsync_pb2_grpc.WeightSyncServiceStub(channel)
        try:
            async for message in stream(stub.Activate(request), what, deadlines.ACTIVATE_S + 10):
                if message.HasField("done"):
                    return
                logger.debug("%s: %s", what, message.engine)
        except WorkerFailedError as error:
            raise WorkerLostError(str(error)) from error
    raise WorkerLostError(f"{what}: the stream ended before the version was active")
