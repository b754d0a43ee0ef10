"""The end of a job on its workers."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from miles.rpc.gen import controller_pb2
from miles.services.controller.clients.calls import WorkerFailedError, WorkerLostError
from miles.services.controller.clients.rollout import RolloutLink
from miles.services.controller.clients.trainer import TrainerLink, release_weights
from miles.services.controller.jobs.context import JobContext
from miles.services.controller.workers.registry import AttachedWorker, WorkerRegistry


async def release_workers(
    context: JobContext, registry: WorkerRegistry, links: Sequence[RolloutLink], weightsync_address: str
) -> None:
    """Have every worker drop the job, however it ended, so that the next one finds them free."""
    trainers = registry.alive(controller_pb2.WORKER_KIND_TRAINER)
    await _all(
        [
            *(link.stop_job() for link in links),
            *(_stop_trainer(worker, context, weightsync_address) for worker in trainers),
        ]
    )
    # Only then: until they have dropped the job, they may still read its weights.
    await _all([release_weights(context, weightsync_address)])


async def _stop_trainer(worker: AttachedWorker, context: JobContext, weightsync_address: str) -> None:
    trainer = TrainerLink(worker, context, weightsync_address)
    try:
        await trainer.stop_job()
    finally:
        await trainer.close()


async def _all(calls: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Make all calls at once; a worker that is gone, or refuses, has nothing of the job that could be taken from it."""
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(outcome, BaseException) and not isinstance(outcome, WorkerLostError | WorkerFailedError):
            raise outcome
