"""The trainer's gRPC service: one job at a time, its steps in order, each exactly once."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import pathlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio

from miles.config import ConfigError, JobConfig
from miles.queue import GroupQueue, connect_async
from miles.queue.payload import encode_group
from miles.rpc import abort, connect_blocking
from miles.rpc.gen import controller_pb2, policy_pb2, trainer_pb2, trainer_pb2_grpc, weightsync_pb2_grpc
from miles.services.trainer.answers import WORD_EVERY_S, as_status, refuse, until_done
from miles.services.trainer.backends.base import Progress, TrainerState
from miles.services.trainer.checkpoint.state import Checkpointing
from miles.services.trainer.ranks.abandoning import Abandonment
from miles.services.trainer.ranks.collective_calls import Command
from miles.services.trainer.ranks.leader import Leader
from miles.services.trainer.step.rollout_metrics import rollout_metrics
from miles.types import SampleGroup

if TYPE_CHECKING:
    import redis.asyncio

    from miles.weights import PublishResult, WeightPublisher

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

SERVICE_NAME = trainer_pb2.DESCRIPTOR.services_by_name["TrainerService"].full_name
_LAST_SAVE_S = 45.0
"""How long a trainer that is told to end waits for the checkpoint that it is writing; less than `STOP_LIMIT_S`."""


@dataclasses.dataclass(slots=True)
class _Job:
    """The job that the trainer holds."""

    job_id: str
    config: JobConfig
    run_dir: pathlib.Path
    redis: redis.asyncio.Redis
    queue: GroupQueue
    weightsync: grpc.Channel
    weightsync_address: str
    state: TrainerState
    checkpoints: Checkpointing
    publisher: WeightPublisher | None = None
    """Kept from one version to the next: it holds mappings that are costly to make."""


class TrainerServicer(trainer_pb2_grpc.TrainerServiceServicer):
    """Answers on the event loop; everything that takes time runs in the leader's thread or waits for Redis."""

    def __init__(self, leader: Leader) -> None:
        self._leader = leader
        self._job: _Job | None = None
        self._turn = asyncio.Lock()
        self._work: asyncio.Task[Any] | None = None
        """What the request whose turn it is, or was, has set going; it runs to its end even when the caller leaves."""
        self._abandonment: Abandonment | None = None
        """Of the training step that runs."""
        self._unwanted: int | None = None
        """A training step that is to be left as soon as it is asked for."""
        self._phase = trainer_pb2.TRAIN_PHASE_UNSPECIFIED
        self._activity = "idle"
        self._progress = 0

    def heartbeat(self) -> controller_pb2.WorkerHeartbeat:
        """What the trainer is doing; progress counts micro-batches."""
        return controller_pb2.WorkerHeartbeat(progress=self._progress, activity=self._activity)

    async def close(self) -> None:
        """Let go of the job when its checkpoint is complete; its memory ends with the process."""
        job = self._job
        if job is None:
            return
        try:
            await asyncio.wait_for(self._release(job), _LAST_SAVE_S)
        except TimeoutError:
            newest = job.checkpoints.newest or "the start"
            logger.warning("leaving while a checkpoint is being written; the next trainer goes on from %s", newest)

    async def StartJob(
        self,
        request: trainer_pb2.TrainerStartJobRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[trainer_pb2.TrainerStartJobResponse]:
        """See trainer.proto."""
        async with self._exclusive(context, "starting"):
            if self._job is not None and self._job.job_id != request.job_id:
                await refuse(context, f"the trainer holds job {self._job.job_id}; stop that one first")
            self._unwanted = None
            if self._job is None:
                config = await self._parse_config(request, context)
                start = self._begin(self._start(request, config))
                began = time.monotonic()
                while not (await asyncio.wait([start], timeout=WORD_EVERY_S))[0]:
                    stage = f"loading {config.rollout.hf_checkpoint} ({time.monotonic() - began:.0f} s)"
                    yield trainer_pb2.TrainerStartJobResponse(stage=stage)
                async with as_status(context):
                    await start
            assert self._job is not None
            yield trainer_pb2.TrainerStartJobResponse(stage="ready", ready=self._ready(self._job))

    async def StopJob(
        self, request: trainer_pb2.TrainerStopJobRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> trainer_pb2.TrainerStopJobResponse:
        """See trainer.proto."""
        async with self._exclusive(context, "stopping"):
            job = self._job
            if job is not None and job.job_id == request.job_id:
                self._job = None
                async with as_status(context):
                    await self._give_up(job)
        return trainer_pb2.TrainerStopJobResponse()

    async def Train(
        self, request: trainer_pb2.TrainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[trainer_pb2.TrainResponse]:
        """See trainer.proto."""
        async with self._exclusive(context, f"training step {request.step}"):
            job = await self._held(request.job_id, context)
            if request.step >= job.state.step:
                await self._check_train_request(job, request, context)
                reports: asyncio.Queue[trainer_pb2.TrainResponse] = asyncio.Queue()
                step = self._begin(self._train(job, request, self._reporter(reports)))
                async for message in until_done(step, reports):
                    yield message
                async with as_status(context):
                    taken = await step
                if not taken:
                    yield trainer_pb2.TrainResponse(phase=trainer_pb2.TRAIN_PHASE_ABANDONED)
                    return
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
                checkpoint_dir=str(job.checkpoints.newest or ""),
            )
            yield trainer_pb2.TrainResponse(phase=trainer_pb2.TRAIN_PHASE_DONE, done=done)

    async def AbandonStep(
        self, request: trainer_pb2.AbandonStepRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> trainer_pb2.AbandonStepResponse:
        """See trainer.proto; waits for nobody's turn."""
        job = await self._held(request.job_id, context)
        if request.step != job.state.step:
            return trainer_pb2.AbandonStepResponse(abandoning=False)
        if self._abandonment is not None:
            return trainer_pb2.AbandonStepResponse(abandoning=self._abandonment.request())
        self._unwanted = request.step
        return trainer_pb2.AbandonStepResponse(abandoning=True)

    async def Export(
        self, request: trainer_pb2.ExportRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> trainer_pb2.ExportResponse:
        """See trainer.proto."""
        async with self._exclusive(context, f"exporting version {request.version}"):
            job = await self._held(request.job_id, context)
            if request.stream != policy_pb2.WEIGHT_STREAM_POLICY:
                await abort(context, grpc.StatusCode.UNIMPLEMENTED, "this trainer has a policy and no draft model")
            if request.version != job.state.step:
                await refuse(
                    context, f"version {request.version} was asked for, but the trainer is at step {job.state.step}"
                )
            began = time.monotonic()
            async with as_status(context):
                result = await asyncio.shield(self._begin(self._publish(job, request.version)))
        return trainer_pb2.ExportResponse(
            version=result.manifest.version, total_bytes=result.total_bytes, export_s=time.monotonic() - began
        )

    async def SaveCheckpoint(
        self, request: trainer_pb2.SaveCheckpointRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> trainer_pb2.SaveCheckpointResponse:
        """See trainer.proto."""
        async with self._exclusive(context, "saving"):
            job = await self._held(request.job_id, context)
            began = time.monotonic()
            async with as_status(context):
                hf_dir = await asyncio.shield(self._begin(self._save(job, request)))
        return trainer_pb2.SaveCheckpointResponse(
            checkpoint_dir=str(job.checkpoints.newest or ""),
            hf_dir="" if hf_dir is None else str(hf_dir),
            step=job.state.step,
            save_s=time.monotonic() - began,
        )

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

    async def _start(self, request: trainer_pb2.TrainerStartJobRequest, config: JobConfig) -> None:
        run_dir = pathlib.Path(request.run_dir)
        folder = checkpoint_dir(config, run_dir)
        arguments = {"config": config.to_flat(), "checkpoint_dir": str(folder)}
        state: TrainerState = await self._leader.run(Command("start", arguments))
        client = await connect_async(request.redis_url)
        loaded_from = self._leader.worker.loaded_from
        queue = GroupQueue(client, request.job_id)
        saved_step = state.step if loaded_from is not None and loaded_from == folder / loaded_from.name else None
        job = _Job(
            job_id=request.job_id,
            config=config,
            run_dir=run_dir,
            redis=client,
            queue=queue,
            weightsync=connect_blocking(request.weightsync_address),
            weightsync_address=request.weightsync_address,
            state=state,
            checkpoints=Checkpointing(self._leader, queue, folder, saved_step),
        )
        if loaded_from is not None:  # a crash between a checkpoint and its acknowledgement leaves entries behind
            left = [entry.group_id for entry in await job.queue.outstanding() if state.is_consumed(entry.group_id)]
            await job.queue.acknowledge(left)
        self._job = job

    async def _train(self, job: _Job, request: trainer_pb2.TrainRequest, report: Callable[[Progress], None]) -> bool:
        """Returns False for a step that was abandoned."""
        job.checkpoints.check()
        unwanted, self._unwanted = self._unwanted == request.step, None
        if unwanted:
            return False
        abandonment = self._abandonment = self._leader.worker.abandonment()
        try:
            return await self._take_step(job, request, report, abandonment)
        finally:
            self._abandonment = None

    async def _take_step(
        self, job: _Job, request: trainer_pb2.TrainRequest, report: Callable[[Progress], None], abandonment: Abandonment
    ) -> bool:
        group_ids = list(request.group_ids)
        report(Progress("waiting", 0, len(group_ids)))
        collected = await job.queue.collect(group_ids, request.deadline_ms / 1000)
        groups: list[SampleGroup] = [group for _, group in collected.values()]
        payloads = tuple(encode_group(group) for group in groups) if self._leader.world_size > 1 else ()
        command = Command("train", {"step": request.step}, payloads)
        try:
            metrics = await self._leader.run(command, groups=groups, report=report, abandonment=abandonment)
        except Exception:
            # Some parameters may have moved and others not: the job has to be loaded again.
            self._job = None
            await self._give_up(job)
            raise
        if metrics is None:
            logger.info("step %d was abandoned; nothing has changed", request.step)
            return False
        job.state.consume([*group_ids, *request.dropped_group_ids])
        job.checkpoints.consumed([*group_ids, *request.dropped_group_ids])
        job.state.finish_step({**metrics, **rollout_metrics(groups, job.config.reward.reward_key)})
        return True

    async def _publish(self, job: _Job, version: int) -> PublishResult:
        from miles.services.trainer.export import export_command, merge
        from miles.weights import WeightPublisher
        from miles.weights.publisher import DeltaSettings
        from miles.weights.transports.names import ENCODING_OF_NAME, TRANSPORT_OF_MODE

        worker, weights = self._leader.worker, job.config.weights
        publisher = job.publisher = job.publisher or WeightPublisher(
            weightsync_pb2_grpc.WeightSyncServiceStub(job.weightsync),
            job.job_id,
            endpoint=worker.endpoint(job.weightsync_address),
            bucket_bytes=weights.update_weight_buffer_size,
            transport=TRANSPORT_OF_MODE[weights.update_weight_transfer_mode],
            delta=DeltaSettings(
                ENCODING_OF_NAME[weights.update_weight_delta_encoding], weights.update_weight_full_interval
            ),
        )
        draft = await self._leader.alone(lambda worker: publisher.begin(version, version, worker.layout(), worker.lora))
        with publisher.discarding_on_failure(draft):
            command = export_command(draft, job.weightsync_address, weights.update_weight_buffer_size)
            reports = await self._leader.gather(command, sender=publisher.sender)
            times = merge(draft, reports)
            return await self._leader.alone(lambda _: publisher.finish(draft, times))

    async def _save(self, job: _Job, request: trainer_pb2.SaveCheckpointRequest) -> pathlib.Path | None:
        """Returns the Hugging Face folder, when one was asked for."""
        step = job.state.step
        await job.checkpoints.save(job.state, in_background=request.in_background)
        template = job.config.checkpoint.save_hf
        if template is None and not request.export_hf:
            return None
        hf_dir = pathlib.Path(template.format(rollout_id=step)) if template else job.run_dir / "hf" / str(step)
        await self._leader.run(Command("save_hf", {"directory": str(hf_dir)}))
        return hf_dir

    async def _give_up(self, job: _Job) -> None:
        try:
            await self._release(job)
        finally:
            await self._leader.run(Command("stop"))

    async def _release(self, job: _Job) -> None:
        try:
            await job.checkpoints.settle()
        finally:
            if job.publisher is not None:
                job.publisher.close()
            job.weightsync.close()
            await job.redis.aclose()

    async def _parse_config(
        self, request: trainer_pb2.TrainerStartJobRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> JobConfig:
        try:
            return JobConfig.from_flat(json.loads(request.config_json)).with_types("train_dtype", "rollout_dtype")
        except (ConfigError, json.JSONDecodeError) as error:
            await refuse(context, f"config_json: {error}", grpc.StatusCode.INVALID_ARGUMENT)

    async def _check_train_request(
        self, job: _Job, request: trainer_pb2.TrainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        if request.step > job.state.step:
            await refuse(context, f"step {request.step} was asked for, but the next one is step {job.state.step}")
        ids = list(request.group_ids)
        if not ids or ids != sorted(set(ids)):
            await abort(context, grpc.StatusCode.INVALID_ARGUMENT, f"group_ids must ascend and not be empty: {ids}")
        again = [i for i in ids if job.state.is_consumed(i)]
        if again:
            await refuse(context, f"groups {again} were trained on or dropped before and are not trained on twice")

    async def _held(self, job_id: str, context: grpc.aio.ServicerContext[Any, Any]) -> _Job:
        if self._job is None or self._job.job_id != job_id:
            held = "no job" if self._job is None else f"job {self._job.job_id}"
            await refuse(context, f"the trainer holds {held}, not {job_id}; call StartJob")
        assert self._job is not None
        return self._job

    def _ready(self, job: _Job) -> trainer_pb2.TrainerReady:
        loaded_from = self._leader.worker.loaded_from
        return trainer_pb2.TrainerReady(
            step=job.state.step,
            consumed_below=job.state.consumed_below,
            consumed_group_ids=sorted(job.state.consumed_group_ids),
            checkpoint_dir="" if loaded_from is None else str(loaded_from),
        )

    @contextlib.asynccontextmanager
    async def _exclusive(self, context: grpc.aio.ServicerContext[Any, Any], activity: str) -> AsyncIterator[None]:
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

    def _reporter(self, reports: asyncio.Queue[trainer_pb2.TrainResponse]) -> Callable[[Progress], None]:
        """A callback for the worker thread that turns progress into messages."""
        loop = asyncio.get_running_loop()

        def publish(progress: Progress) -> None:
            phase = trainer_pb2.TrainPhase.Value(f"TRAIN_PHASE_{progress.phase.upper()}")
            self._phase = phase
            self._progress += 1
            reports.put_nowait(
                trainer_pb2.TrainResponse(
                    phase=phase,
                    micro_batches_done=progress.micro_batches_done,
                    micro_batches=progress.micro_batches,
                )
            )

        def report(progress: Progress) -> None:
            loop.call_soon_threadsafe(publish, progress)

        return report


def checkpoint_dir(config: JobConfig, run_dir: pathlib.Path) -> pathlib.Path:
    """Folder in which a job's checkpoints lie."""
    return pathlib.Path(config.checkpoint.save) if config.checkpoint.save else run_dir / "checkpoints"
