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


async def release_workers(context: JobContext, registry: WorkerRegistry) -> None:
    """Have every worker release the job, however it ended, so that the next job finds them free.

    That includes what they have from an earlier life of the controller, if this one ends before it connects to any.
    """
    await _call_all(
        [
            *(_stop_rollout(worker, context) for worker in registry.alive(controller_pb2.WORKER_KIND_ROLLOUT)),
            *(_stop_trainer(worker, context) for worker in registry.alive(controller_pb2.WORKER_KIND_TRAINER)),
        ]
    )
    # Only then: until they have released the job, they may still read its weights.
    weightsyncs = registry.alive(controller_pb2.WORKER_KIND_WEIGHTSYNC)
    await _call_all([WeightSyncClient(worker).release_job(context.job_id) for worker in weightsyncs])


async def _stop_rollout(worker: AttachedWorker, context: JobContext) -> None:
    await RolloutClient(worker, context, weightsync_address="", reward_addresses={}).stop_job()


async def _stop_trainer(worker: AttachedWorker, context: JobContext) -> None:
    async with contextlib.aclosing(TrainerClient(worker, context, weightsync_address="")) as trainer:
        await trainer.stop_job()


async def _call_all(calls: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Make all calls at once; a worker that is lost, or refuses, holds nothing of the job to release."""
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(outcome, BaseException) and not isinstance(outcome, WorkerLostError | WorkerFailedError):
            raise outcome
