"""The trainer's gRPC service: takes requests one at a time, calls the job, answers with results and statuses."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import pathlib
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

import grpc
import grpc.aio

from miles.config import ConfigError, JobConfig
from miles.rpc import abort
from miles.rpc.gen import controller_pb2, policy_pb2, trainer_pb2, trainer_pb2_grpc
from miles.services.trainer.job import Job, StepRequest
from miles.services.trainer.progress_stream import REPORT_EVERY_S, ProgressStream
from miles.services.trainer.ranks.leader import Leader
from miles.services.trainer.statuses import errors_as_status

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

SERVICE_NAME = trainer_pb2.DESCRIPTOR.services_by_name["TrainerService"].full_name
_LAST_SAVE_S = 45.0
"""How long a trainer that is stopping waits for the checkpoint that it is writing; less than `STOP_LIMIT_S`."""


class TrainerServicer(trainer_pb2_grpc.TrainerServiceServicer):
    """Answers on the event loop; slow work runs in the leader's thread or waits for Redis."""

    def __init__(self, leader: Leader) -> None:
        self._leader = leader
        self._started: Job | None = None
        self._turn = asyncio.Lock()
        self._work: asyncio.Task[Any] | None = None
        """What the last request started; it runs to its end even when the caller leaves."""
        self._phase = trainer_pb2.TRAIN_PHASE_UNSPECIFIED
        self._activity = "idle"
        self._progress = 0

    def heartbeat(self) -> controller_pb2.WorkerHeartbeat:
        """What the trainer is doing; progress counts micro-batches."""
        return controller_pb2.WorkerHeartbeat(progress=self._progress, activity=self._activity)

    async def close(self) -> None:
        """Close the job once its checkpoint is complete; its memory is freed with the process."""
        job = self._job
        if job is None:
            return
        try:
            await asyncio.wait_for(job.close(), _LAST_SAVE_S)
        except TimeoutError:
            newest = job.newest_checkpoint or "the start"
            logger.warning("exiting while a checkpoint is being written; the next trainer resumes from %s", newest)

    async def StartJob(
        self,
        request: trainer_pb2.TrainerStartJobRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[trainer_pb2.TrainerStartJobResponse]:
        """See trainer.proto."""
        async with self._exclusive("starting"):
            job = self._job
            if job is not None and job.job_id != request.job_id:
                await abort(
                    context,
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"the trainer holds job {job.job_id}; stop that one first",
                )
            if job is None:
                config = await self._parse_config(request, context)
                start = self._begin(self._start(request, config))
                began = time.monotonic()
                while not (await asyncio.wait([start], timeout=REPORT_EVERY_S))[0]:
                    stage = f"loading {config.rollout.hf_checkpoint} ({time.monotonic() - began:.0f} s)"
                    yield trainer_pb2.TrainerStartJobResponse(stage=stage)
                async with errors_as_status(context):
                    job = await start
            else:
                job.forget_abandoned()
            yield trainer_pb2.TrainerStartJobResponse(stage="ready", ready=_ready(job))

    async def StopJob(
        self, request: trainer_pb2.TrainerStopJobRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> trainer_pb2.TrainerStopJobResponse:
        """See trainer.proto."""
        async with self._exclusive("stopping"):
            job = self._job
            if job is not None and job.job_id == request.job_id:
                self._started = None
                async with errors_as_status(context):
                    await job.discard()
        return trainer_pb2.TrainerStopJobResponse()

    async def Train(
        self, request: trainer_pb2.TrainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[trainer_pb2.TrainResponse]:
        """See trainer.proto."""
        async with self._exclusive(f"training step {request.step}"):
            job = await self._held(request.job_id, context)
            warnings: Sequence[str] = ()
            if request.step >= job.state.step:
                await _check_train_request(job, request, context)
                stream = ProgressStream(self._note_progress)
                step = self._begin(job.train(_step_request(request), stream.report))
                async for message in stream.until_done(step):
                    yield message
                async with errors_as_status(context):
                    taken = await step
                if not taken:
                    yield trainer_pb2.TrainResponse(phase=trainer_pb2.TRAIN_PHASE_ABANDONED)
                    return
                warnings = job.warnings
            metrics = job.state.metrics.get(request.step)
            if metrics is None:
                await abort(
                    context,
                    grpc.StatusCode.OUT_OF_RANGE,
                    f"step {request.step} was taken, but its metrics are no longer kept",
                )
            done = trainer_pb2.TrainDone(
                step=request.step,
                metrics=metrics,
                group_ids=request.group_ids,
                checkpoint_dir=str(job.newest_checkpoint or ""),
                warnings=warnings,
            )
            yield trainer_pb2.TrainResponse(phase=trainer_pb2.TRAIN_PHASE_DONE, done=done)

    async def AbandonStep(
        self, request: trainer_pb2.AbandonStepRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> trainer_pb2.AbandonStepResponse:
        """See trainer.proto; does not wait for its turn."""
        job = await self._held(request.job_id, context)
        return trainer_pb2.AbandonStepResponse(abandoning=job.abandon(request.step))

    async def Export(
        self, request: trainer_pb2.ExportRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> trainer_pb2.ExportResponse:
        """See trainer.proto."""
        async with self._exclusive(f"exporting version {request.version}"):
            job = await self._held(request.job_id, context)
            if request.stream != policy_pb2.WEIGHT_STREAM_POLICY:
                await abort(context, grpc.StatusCode.UNIMPLEMENTED, "this trainer has a policy and no draft model")
            if request.version != job.state.step:
                await abort(
                    context,
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"version {request.version} was asked for, but the trainer is at step {job.state.step}",
                )
            began = time.monotonic()
            async with errors_as_status(context):
                result = await asyncio.shield(self._begin(job.publish(request.version)))
        return trainer_pb2.ExportResponse(
            version=result.manifest.version, total_bytes=result.total_bytes, export_s=time.monotonic() - began
        )

    async def SaveCheckpoint(
        self, request: trainer_pb2.SaveCheckpointRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> trainer_pb2.SaveCheckpointResponse:
        """See trainer.proto."""
        async with self._exclusive("saving"):
            job = await self._held(request.job_id, context)
            began = time.monotonic()
            saving = self._begin(job.save(in_background=request.in_background, export_hf=request.export_hf))
            async with errors_as_status(context):
                hf_dir = await asyncio.shield(saving)
        return trainer_pb2.SaveCheckpointResponse(
            checkpoint_dir=str(job.newest_checkpoint or ""),
            hf_dir="" if hf_dir is None else str(hf_dir),
            step=job.state.step,
            save_s=time.monotonic() - began,
        )

    async def ReleaseMemory(
        self, request: trainer_pb2.TrainerReleaseMemoryRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> trainer_pb2.TrainerReleaseMemoryResponse:
        """See trainer.proto."""
        async with self._exclusive("releasing memory"):
            job = await self._held(request.job_id, context)
            async with errors_as_status(context):
                return await asyncio.shield(self._begin(job.release_memory(state=request.state)))

    async def GetStatus(
        self, request: trainer_pb2.TrainerGetStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> trainer_pb2.TrainerGetStatusResponse:
        """See trainer.proto."""
        job = self._job
        return trainer_pb2.TrainerGetStatusResponse(
            job_id="" if job is None else job.job_id,
            step=0 if job is None else job.state.step,
            phase=self._phase,
            world_size=self._leader.world_size,
        )

    @property
    def _job(self) -> Job | None:
        """The job that the trainer holds; None before StartJob, after StopJob and after a failed step."""
        return None if self._started is None or self._started.is_discarded else self._started

    async def _held(self, job_id: str, context: grpc.aio.ServicerContext[Any, Any]) -> Job:
        job = self._job
        if job is None or job.job_id != job_id:
            held = "no job" if job is None else f"job {job.job_id}"
            await abort(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the trainer holds {held}, not {job_id}; call StartJob",
            )
        return job

    async def _start(self, request: trainer_pb2.TrainerStartJobRequest, config: JobConfig) -> Job:
        job = self._started = await Job.start(
            self._leader,
            request.job_id,
            config,
            pathlib.Path(request.run_dir),
            request.redis_url,
            request.weightsync_address,
            json.loads(request.data_json or "{}"),
        )
        return job

    async def _parse_config(
        self, request: trainer_pb2.TrainerStartJobRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> JobConfig:
        try:
            return JobConfig.from_flat(json.loads(request.config_json)).with_types("train_dtype", "rollout_dtype")
        except (ConfigError, json.JSONDecodeError) as error:
            await abort(context, grpc.StatusCode.INVALID_ARGUMENT, f"config_json: {error}")

    @contextlib.asynccontextmanager
    async def _exclusive(self, activity: str) -> AsyncIterator[None]:
        """One request at a time, and none before the work of one whose caller has left is done."""
        async with self._turn:
            if self._work is not None:
                await asyncio.wait([self._work])
            self._activity = activity
            try:
                yield
            finally:
                self._activity = "idle"
                self._phase = trainer_pb2.TRAIN_PHASE_UNSPECIFIED

    def _begin(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Run work that the next request must wait for."""
        task = self._work = asyncio.ensure_future(work)
        return task

    def _note_progress(self, message: trainer_pb2.TrainResponse) -> None:
        self._phase = message.phase
        self._progress += 1


def _step_request(request: trainer_pb2.TrainRequest) -> StepRequest:
    return StepRequest(
        step=request.step,
        group_ids=list(request.group_ids),
        dropped_group_ids=list(request.dropped_group_ids),
        deadline_s=request.deadline_ms / 1000,
    )


async def _check_train_request(
    job: Job, request: trainer_pb2.TrainRequest, context: grpc.aio.ServicerContext[Any, Any]
) -> None:
    if request.step > job.state.step:
        await abort(
            context,
            grpc.StatusCode.FAILED_PRECONDITION,
            f"step {request.step} was asked for, but the next one is step {job.state.step}",
        )
    ids = list(request.group_ids)
    if not ids or ids != sorted(set(ids)):
        await abort(context, grpc.StatusCode.INVALID_ARGUMENT, f"group_ids must ascend and not be empty: {ids}")
    again = [i for i in ids if job.state.is_consumed(i)]
    if again:
        await abort(
            context,
            grpc.StatusCode.FAILED_PRECONDITION,
            f"groups {again} were trained on or dropped before and are not trained on twice",
        )


def _ready(job: Job) -> trainer_pb2.TrainerReady:
    return trainer_pb2.TrainerReady(
        step=job.state.step,
        consumed_below=job.state.consumed_below,
        consumed_group_ids=sorted(job.state.consumed_group_ids),
        checkpoint_dir=str(job.loaded_from or ""),
        data_begins_at=job.state.data_begins_at,
        notes=job.notes,
        loaded_step=job.loaded_step,
    )
