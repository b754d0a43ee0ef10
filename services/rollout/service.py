"""The gRPC side of the rollout service: calls in, plain method calls out."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any, TypeAlias

import grpc
import grpc.aio
import numpy as np
from redis.exceptions import RedisError

from miles.queue import RedisUnsuitable
from miles.rpc import abort
from miles.rpc.gen import controller_pb2, rollout_pb2, rollout_pb2_grpc, sample_pb2
from miles.services.rollout.engines.base import FinishReason, GenerationDelta, GenerationRequest, PauseMode
from miles.services.rollout.groups.messages import sampling_from_proto
from miles.services.rollout.job import RolloutJob
from miles.services.rollout.run_stream import RunStream
from miles.services.rollout.serving.pauses import PauseRefused
from miles.services.rollout.speculation_progress import drafting_load
from miles.types.convert import array_from_proto, array_to_proto

log = logging.getLogger(__name__)

GENERATE_VERSION_DEADLINE_S = 60.0
OPEN_DEADLINE_S = 30.0

_PAUSE_MODES = {
    rollout_pb2.PAUSE_MODE_IN_PLACE: PauseMode.IN_PLACE,
    rollout_pb2.PAUSE_MODE_RETRACT: PauseMode.RETRACT,
    rollout_pb2.PAUSE_MODE_ABORT: PauseMode.ABORT,
}
_FINISH_REASONS = {
    FinishReason.STOP: rollout_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: rollout_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: rollout_pb2.FINISH_REASON_ABORT,
}

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class RolloutServicer(rollout_pb2_grpc.RolloutServiceServicer):
    """Serves the jobs loaded on this worker.

    Errors that a retry may cure are answered UNAVAILABLE; callers take any other status as the failure of the job.
    Streams are written with `context.write`, not yielded, so that a call that ends early cleans up at once.
    """

    def __init__(self, *, worker_id: str, device: str | None = None, engine_addresses: Sequence[str] = ()) -> None:
        self._worker_id = worker_id
        self._device = device
        self._engine_addresses = tuple(engine_addresses)
        self._jobs: dict[str, RolloutJob] = {}
        self._streams: dict[str, RunStream] = {}
        self._starting = asyncio.Lock()
        self._request_ids = itertools.count()

    async def StartJob(self, request: rollout_pb2.RolloutStartJobRequest, context: Context) -> None:  # type: ignore[override]
        from miles.config import ConfigError, JobConfig

        async with _answered(context, (ConfigError, json.JSONDecodeError), grpc.StatusCode.INVALID_ARGUMENT):
            config = JobConfig.from_flat(json.loads(request.config_json)).with_types("rollout_dtype")
        job = RolloutJob(
            request.job_id,
            config,
            redis_url=request.redis_url,
            weightsync_address=request.weightsync_address,
            reward_addresses=request.reward_addresses,
            worker_id=self._worker_id,
            device=self._device,
            engine_addresses=self._engine_addresses,
        )
        async with self._starting:
            loaded = self._jobs.get(request.job_id)
            if loaded is not None and loaded.origin != job.origin:
                await context.write(rollout_pb2.RolloutStartJobResponse(stage="stopping the job as configured before"))
                await self._stop(request.job_id)
            if request.job_id not in self._jobs:
                try:
                    async with contextlib.aclosing(job.start()) as stages:
                        async for stage in stages:
                            await context.write(rollout_pb2.RolloutStartJobResponse(stage=stage))
                except RedisError as error:
                    await abort(context, grpc.StatusCode.UNAVAILABLE, str(error))
                except (RedisUnsuitable, ValueError, OSError, RuntimeError) as error:  # engines raise RuntimeError
                    await abort(context, grpc.StatusCode.FAILED_PRECONDITION, f"{type(error).__name__}: {error}")
                self._jobs[request.job_id] = job
        await context.write(rollout_pb2.RolloutStartJobResponse(stage="ready", ready=True))

    async def StopJob(
        self, request: rollout_pb2.RolloutStopJobRequest, context: Context
    ) -> rollout_pb2.RolloutStopJobResponse:
        async with self._starting:
            await self._stop(request.job_id)
        return rollout_pb2.RolloutStopJobResponse()

    async def Run(self, requests: AsyncIterator[rollout_pb2.RunRequest], context: Context) -> None:  # type: ignore[override]
        try:
            async with asyncio.timeout(OPEN_DEADLINE_S):
                first = await anext(aiter(requests))
        except StopAsyncIteration:
            return
        except TimeoutError:
            problem = f"the Run stream was not opened within {OPEN_DEADLINE_S:.0f} s"
            await abort(context, grpc.StatusCode.DEADLINE_EXCEEDED, problem)
        if first.WhichOneof("kind") != "open":
            await abort(context, grpc.StatusCode.INVALID_ARGUMENT, "the first message of a Run stream opens it")
        opening = first.open
        job = await self._job(opening.job_id, context)
        before = self._streams.get(opening.job_id)
        if before is not None and opening.lease_number < before.lease_number:
            problem = f"worker lease {opening.lease_number} is over; worker lease {before.lease_number} replaced it"
            await abort(context, grpc.StatusCode.UNAVAILABLE, problem)
        if before is not None:
            before.end()
            job.groups.preempt_all()
        stream = RunStream(job, opening)
        self._streams[opening.job_id] = stream
        async with contextlib.AsyncExitStack() as cleanup:
            cleanup.callback(self._end_stream, job, stream)
            responses = await cleanup.enter_async_context(contextlib.aclosing(stream.responses(requests)))
            async for response in responses:
                await context.write(response)

    def _end_stream(self, job: RolloutJob, stream: RunStream) -> None:
        if self._streams.get(job.job_id) is stream:
            del self._streams[job.job_id]
            job.groups.preempt_all()

    async def Generate(self, request: rollout_pb2.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        job = await self._job(request.job_id, context)
        # RuntimeError: the engine lost the request, and a retry may work.
        async with (
            _answered(context, ValueError, grpc.StatusCode.INVALID_ARGUMENT),
            _answered(context, (TimeoutError, RuntimeError), grpc.StatusCode.UNAVAILABLE),
        ):
            tokens = array_from_proto(request.tokens, "tokens", dtypes=(np.int32,), ndim=1)
            generation = GenerationRequest(
                request_id=f"generate-{next(self._request_ids)}",
                input_ids=tokens.tolist(),
                sampling=sampling_from_proto(request.sampling),
                return_routed_experts=request.return_routed_experts,
            )
            await job.serving.gate.wait(None, None, GENERATE_VERSION_DEADLINE_S)
            async with contextlib.aclosing(job.engine.generate(generation)) as deltas:
                async for delta in deltas:
                    await context.write(_generate_response(delta))

    async def Pause(self, request: rollout_pb2.PauseRequest, context: Context) -> rollout_pb2.PauseResponse:
        job = await self._job(request.job_id, context)
        mode = _PAUSE_MODES.get(request.mode)
        if mode is None:
            await abort(context, grpc.StatusCode.INVALID_ARGUMENT, f"mode {request.mode}: IN_PLACE, RETRACT or ABORT")
        async with _answered(context, PauseRefused, grpc.StatusCode.FAILED_PRECONDITION):
            pause_s = await job.serving.pause(mode, request.operation_id, request.token_ttl_ms / 1000)
        return rollout_pb2.PauseResponse(pause_s=pause_s)

    async def Resume(self, request: rollout_pb2.ResumeRequest, context: Context) -> rollout_pb2.ResumeResponse:
        job = await self._job(request.job_id, context)
        async with _answered(context, PauseRefused, grpc.StatusCode.FAILED_PRECONDITION):
            await job.serving.resume(request.operation_id)
        return rollout_pb2.ResumeResponse()

    async def ReleaseMemory(
        self, request: rollout_pb2.ReleaseMemoryRequest, context: Context
    ) -> rollout_pb2.ReleaseMemoryResponse:
        job = await self._job(request.job_id, context)
        released, seconds = await job.serving.release_memory()
        return rollout_pb2.ReleaseMemoryResponse(release_s=seconds, released_bytes=released)

    async def GetStatus(
        self, request: rollout_pb2.RolloutGetStatusRequest, context: Context
    ) -> rollout_pb2.RolloutGetStatusResponse:
        jobs = list(self._jobs.values())
        reasons = [job.serving.quarantine_reason for job in jobs if job.serving.quarantine_reason]
        return rollout_pb2.RolloutGetStatusResponse(
            job_ids=list(self._jobs),
            progress=self.progress(),
            paused=any(job.serving.paused for job in jobs),
            quarantine_reason="; ".join(reasons),
        )

    def progress(self) -> rollout_pb2.RunProgress:
        """Counters over all jobs; version and drafts only when there is one job."""
        all_progress = [job.progress() for job in self._jobs.values()]
        total = rollout_pb2.RunProgress(
            running_requests=sum(p.running_requests for p in all_progress),
            waiting_requests=sum(p.waiting_requests for p in all_progress),
            generated_tokens=sum(p.generated_tokens for p in all_progress),
            busy_s=sum(p.busy_s for p in all_progress),
        )
        if len(all_progress) == 1 and all_progress[0].HasField("version"):
            total.version = all_progress[0].version
        if len(all_progress) == 1 and all_progress[0].HasField("speculation"):
            total.speculation.CopyFrom(all_progress[0].speculation)
        return total

    def heartbeat(self) -> controller_pb2.WorkerHeartbeat:
        """The worker's heartbeat to the controller."""
        progress = self.progress()
        busy = progress.running_requests or progress.waiting_requests
        return controller_pb2.WorkerHeartbeat(
            progress=progress.generated_tokens,
            activity="generating" if busy else "idle",
            load={
                "running_requests": progress.running_requests,
                "waiting_requests": progress.waiting_requests,
                **drafting_load(progress),
            },
        )

    async def close(self) -> None:
        """Stop all jobs: preempt and store their groups, and report that on their streams."""
        for job_id in list(self._jobs):
            await self._stop(job_id)

    async def _stop(self, job_id: str) -> None:
        job = self._jobs.pop(job_id, None)
        if job is None:
            return
        await job.groups.preempt_and_wait()
        stream = self._streams.pop(job_id, None)
        if stream is not None:
            stream.end()
        await job.close()

    async def _job(self, job_id: str, context: Context) -> RolloutJob:
        job = self._jobs.get(job_id)
        if job is None:
            # UNAVAILABLE: this worker has restarted since the job was started on it; starting it again helps.
            problem = f"job {job_id!r} is not loaded on rollout {self._worker_id}; call StartJob first"
            await abort(context, grpc.StatusCode.UNAVAILABLE, problem)
        return job


@contextlib.asynccontextmanager
async def _answered(
    context: Context, errors: type[Exception] | tuple[type[Exception], ...], code: grpc.StatusCode
) -> AsyncIterator[None]:
    """Answer the call with `code` when the block raises one of `errors`."""
    try:
        yield
    except errors as error:
        await abort(context, code, str(error))


def _generate_response(delta: GenerationDelta) -> rollout_pb2.GenerateResponse:
    response = rollout_pb2.GenerateResponse(
        tokens=array_to_proto(np.asarray(delta.token_ids, np.int32)),
        log_probs=array_to_proto(np.asarray(delta.log_probs, np.float32)),
    )
    if (result := delta.result) is not None:
        spans = [sample_pb2.VersionSpan(version=s.version, start=s.start, end=s.end) for s in result.weight_versions]
        experts = None if result.routed_experts is None else array_to_proto(result.routed_experts)
        response.finished.CopyFrom(
            rollout_pb2.GenerateFinished(
                reason=_FINISH_REASONS[result.reason], weight_versions=spans, routed_experts=experts
            )
        )
    return response
