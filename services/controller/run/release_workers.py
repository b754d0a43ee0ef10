"""Releases every worker at the end of a job."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from typing import Any

from miles.rpc import connect, connected
from miles.rpc.gen import (
    controller_pb2,
    draft_trainer_pb2,
    draft_trainer_pb2_grpc,
    rollout_pb2,
    rollout_pb2_grpc,
    trainer_pb2,
    trainer_pb2_grpc,
)
from miles.services.controller.clients import deadlines
from miles.services.controller.clients.calls import WorkerFailedError, WorkerLostError, call
from miles.services.controller.clients.weightsync import WeightSyncClient
from miles.services.controller.workers.registry import AttachedWorker, WorkerRegistry


async def release_workers(job_id: str, registry: WorkerRegistry) -> None:
    """Have every worker release the job, however it ended, so that the next job finds them free.

    That includes what they have from an earlier life of the controller, if this one ends before it connects to any.
    """
    await _call_all(
        [
            *(_stop_rollout(worker, job_id) for worker in registry.alive(controller_pb2.WORKER_KIND_ROLLOUT)),
            *(_stop_trainer(worker, job_id) for worker in registry.alive(controller_pb2.WORKER_KIND_TRAINER)),
            *(_stop_drafts(worker, job_id) for worker in registry.alive(controller_pb2.WORKER_KIND_DRAFT_TRAINER)),
        ]
    )
    # Only then: until they have released the job, they may still read its weights.
    weightsyncs = registry.alive(controller_pb2.WORKER_KIND_WEIGHTSYNC)
    await _call_all([_release_weights(worker, job_id) for worker in weightsyncs])


async def _stop_rollout(worker: AttachedWorker, job_id: str) -> None:
    with connected(worker.registration.address) as channel:
        stub = rollout_pb2_grpc.RolloutServiceStub(channel)
        request = rollout_pb2.RolloutStopJobRequest(job_id=job_id)
        await call(stub.StopJob(request), f"rollout {worker.worker_id} stop", deadlines.STOP_JOB_S)


async def _stop_trainer(worker: AttachedWorker, job_id: str) -> None:
    async with connect(worker.registration.address) as channel:
        stub = trainer_pb2_grpc.TrainerServiceStub(channel)
        await call(stub.StopJob(trainer_pb2.TrainerStopJobRequest(job_id=job_id)), "trainer stop", deadlines.STOP_JOB_S)


async def _stop_drafts(worker: AttachedWorker, job_id: str) -> None:
    async with connect(worker.registration.address) as channel:
        stub = draft_trainer_pb2_grpc.DraftTrainerServiceStub(channel)
        request = draft_trainer_pb2.DraftTrainerStopJobRequest(job_id=job_id)
        await call(stub.StopJob(request), "draft trainer stop", deadlines.STOP_JOB_S)


async def _release_weights(worker: AttachedWorker, job_id: str) -> None:
    with contextlib.closing(WeightSyncClient(worker)) as weightsync:
        await weightsync.release_job(job_id)


async def _call_all(calls: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Make all calls at once; a worker that is lost, or refuses, holds nothing of the job to release."""
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(outcome, BaseException) and not isinstance(outcome, WorkerLostError | WorkerFailedError):
            raise outcome
