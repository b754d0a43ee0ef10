"""The draft trainer's gRPC service: takes requests, calls the job, answers with where it stands."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from miles.change_signal import ChangeSignal
from miles.config import ConfigError, JobConfig
from miles.rpc import abort
from miles.rpc.gen import controller_pb2, draft_trainer_pb2, draft_trainer_pb2_grpc
from miles.services.trainer.statuses import errors_as_status

if TYPE_CHECKING:
    from miles.services.trainer.drafts.job import DraftJob

logger = logging.getLogger(__name__)

SERVICE_NAME = draft_trainer_pb2.DESCRIPTOR.services_by_name["DraftTrainerService"].full_name
_REPORT_EVERY_S = 1.0
"""How often a stream repeats its last message while nothing changes."""
_STOP_S = 25.0
"""How long a job may take to end the step that it is in and to save; less than the controller waits for it."""
_LAST_SAVE_S = 45.0
"""The same for a process that is stopping; less than `STOP_LIMIT_S`."""

LoadJob = Callable[[draft_trainer_pb2.DraftTrainerStartJobRequest, JobConfig, Callable[[], None]], "DraftJob"]
"""Loads a job: request, its configuration, and what to call at each change, from any thread. Blocks."""


class DraftTrainerServicer(draft_trainer_pb2_grpc.DraftTrainerServiceServicer):
    """Answers on the event loop; the job works in a thread of its own."""

    def __init__(self, load: LoadJob) -> None:
        self._load = load
        self._job: DraftJob | None = None
        self._turn = asyncio.Lock()
        self._changed = ChangeSignal()

    def heartbeat(self) -> controller_pb2.WorkerHeartbeat:
        """What the draft trainer is doing; progress counts optimizer steps."""
        if self._job is None:
            return controller_pb2.WorkerHeartbeat(activity="idle")
        progress = self._job.progress
        return controller_pb2.WorkerHeartbeat(progress=progress.optimizer_steps, activity=progress.activity)

    async def close(self) -> None:
        """Save what the job has learned since its last version."""
        await self._discard(_LAST_SAVE_S)

    async def StartJob(
        self,
        request: draft_trainer_pb2.DraftTrainerStartJobRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[draft_trainer_pb2.DraftTrainerStartJobResponse]:
        """See draft_trainer.proto."""
        async with self._turn:
            job = self._job
            if job is not None and job.job_id != request.job_id:
                problem = f"the draft trainer holds job {job.job_id}; stop that one first"
                await abort(context, grpc.StatusCode.FAILED_PRECONDITION, problem)
            if job is not None and job.failure is None:
                if request.HasField("policy_step"):
                    job.reload(request.policy_step)
            else:
                self._job = job = None  # its memory is free for the one that is loaded
                async with contextlib.aclosing(self._start(request, context)) as stages:
                    async for stage in stages:
                        yield draft_trainer_pb2.DraftTrainerStartJobResponse(stage=stage)
        yield draft_trainer_pb2.DraftTrainerStartJobResponse(stage="ready", ready=True)

    async def StopJob(
        self, request: draft_trainer_pb2.DraftTrainerStopJobRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> draft_trainer_pb2.DraftTrainerStopJobResponse:
        """See draft_trainer.proto."""
        async with self._turn:
            if self._job is not None and self._job.job_id == request.job_id:
                async with errors_as_status(context):
                    await self._discard(_STOP_S)
        return draft_trainer_pb2.DraftTrainerStopJobResponse()

    async def Watch(
        self, request: draft_trainer_pb2.WatchDraftsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[draft_trainer_pb2.WatchDraftsResponse]:
        """See draft_trainer.proto; ends with INTERNAL when the training has ended by an error."""
        job, told = await self._held(request.job_id, context), 0
        while True:
            message = job.progress.to_proto()
            for number, text in list(job.warnings):
                if number > told:
                    told = number
                    message.warnings.append(text)
            yield message
            if job.failure is not None:
                await abort(context, grpc.StatusCode.INTERNAL, f"the training of drafts has ended: {job.failure}")
            if self._job is not job:
                return
            await self._changed.wait(_REPORT_EVERY_S)

    async def Hold(
        self, request: draft_trainer_pb2.HoldDraftsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> draft_trainer_pb2.HoldDraftsResponse:
        """See draft_trainer.proto."""
        job = await self._held(request.job_id, context)
        if not request.hold:
            job.go_on()
            return draft_trainer_pb2.HoldDraftsResponse()
        released = await asyncio.to_thread(job.hold, release_memory=request.release_memory)
        return draft_trainer_pb2.HoldDraftsResponse(released_bytes=released)

    async def _start(
        self, request: draft_trainer_pb2.DraftTrainerStartJobRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[str, None]:
        try:
            config = JobConfig.from_flat(json.loads(request.config_json)).with_types("rollout_dtype")
        except (ConfigError, json.JSONDecodeError) as error:
            await abort(context, grpc.StatusCode.INVALID_ARGUMENT, f"config_json: {error}")
        loop, began = asyncio.get_running_loop(), time.monotonic()

        def on_change() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody is left to be told
                loop.call_soon_threadsafe(self._changed.notify)

        async def load() -> None:
            job = await asyncio.to_thread(self._load, request, config, on_change)
            job.begin()
            self._job = job

        loading = asyncio.ensure_future(load())
        try:
            while not (await asyncio.wait([loading], timeout=_REPORT_EVERY_S))[0]:
                yield f"loading the draft model ({time.monotonic() - began:.0f} s)"
        finally:
            await asyncio.wait([loading])  # a thread cannot be cancelled, and a caller that has left may come again
        async with errors_as_status(context):
            loading.result()

    async def _held(self, job_id: str, context: grpc.aio.ServicerContext[Any, Any]) -> DraftJob:
        job = self._job
        if job is None or job.job_id != job_id:
            held = "no job" if job is None else f"job {job.job_id}"
            problem = f"the draft trainer holds {held}, not {job_id}; call StartJob"
            await abort(context, grpc.StatusCode.FAILED_PRECONDITION, problem)
        return job

    async def _discard(self, deadline_s: float) -> None:
        job, self._job = self._job, None
        self._changed.notify()
        if job is not None:
            await asyncio.to_thread(job.close, deadline_s)
