"""Releases every worker at the end of a job."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from typing import Any

from miles.rpc.gen import controller_pb2
from miles.services.controller.clients.calls import WorkerFailedError, WorkerLostError
from miles.services.controller.clients.rollout import RolloutClient
from miles.services.controller.clients.trainer import TrainerClient
from miles.services.controller.clients.weightsync import WeightSyncClient
from miles.services.controller.jobs.context import JobContext
from miles.services.controller.workers.registry import AttachedWorker, WorkerRegistry


async def release_workers(
    context: JobContext, registry: WorkerRegistry, rollouts: Sequence[RolloutClient], weightsync: WeightSyncClient
) -> None:
    """Have every worker release the job, however it ended, so that the next job finds them free."""
    trainers = registry.alive(controller_pb2.WORKER_KIND_TRAINER)
    await _call_all(
        [
            *(client.stop_job() for client in rollouts),
            *(_stop_trainer(worker, context, weightsync.address) for worker in trainers),
        ]
    )
    # Only then: until they have released the job, they may still read its weights.
    await _call_all([weightsync.release_job(context.job_id)])


async def _stop_trainer(worker: AttachedWorker, context: JobContext, weightsync_address: str) -> None:
    async with contextlib.aclosing(TrainerClient(worker, context, weightsync_address)) as trainer:
        await trainer.stop_job()


async def _call_all(calls: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Make all calls at once; a worker that is lost, or refuses, holds nothing of the job to release."""
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(outcome, BaseException) and not isinstance(outcome, WorkerLostError | WorkerFailedError):
            raise outcome
