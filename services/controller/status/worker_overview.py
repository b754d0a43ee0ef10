"""Describes workers to users: health, load, and the version that each engine serves."""

from __future__ import annotations

import contextlib
import logging
import time

import grpc.aio

from miles.rpc.gen import controller_pb2, policy_pb2, weightsync_pb2
from miles.services.controller.clients.weightsync import WeightSyncClient
from miles.services.controller.workers.registry import AttachedWorker, WorkerRegistry

logger = logging.getLogger(__name__)

STUCK_AFTER_S = 300.0
"""A busy worker without progress for so long counts as stuck: longer than loading a model should take."""
_VERSIONS_FOR_S = 1.0
"""How long an answer of the weight-sync service is used."""
_ANSWER_S = 2.0

Versions = dict[str, list[controller_pb2.HeldVersion]]
"""By worker id."""


class WorkerOverview:
    """Describes all workers, recently lost ones included."""

    def __init__(self, registry: WorkerRegistry) -> None:
        self._registry = registry
        self._versions: Versions = {}
        self._versions_until_s = 0.0

    async def describe(self, running_job: str | None) -> list[controller_pb2.Worker]:
        """Describe every worker, ordered by its id."""
        versions = await self._engine_versions(running_job)
        workers = [
            *((worker, True) for worker in self._registry.everyone()),
            *((worker, False) for worker in self._registry.recently_lost()),
        ]
        described = [
            controller_pb2.Worker(
                registration=worker.registration,
                heartbeat=worker.heartbeat,
                lease_number=worker.lease_number,
                alive=alive,
                last_seen_unix_ns=worker.last_seen_unix_ns,
                job_ids=[running_job] if alive and running_job else [],
                health=_health(worker, alive, versions.get(worker.worker_id, [])),
                progress_unix_ns=worker.progress_unix_ns,
                versions=versions.get(worker.worker_id, []) if alive else [],
            )
            for worker, alive in workers
        ]
        return sorted(described, key=lambda worker: worker.registration.worker_id)

    async def _engine_versions(self, job_id: str | None) -> Versions:
        services = self._registry.alive(controller_pb2.WORKER_KIND_WEIGHTSYNC)
        if job_id is None or not services:
            return {}
        now = time.monotonic()
        if now >= self._versions_until_s:
            self._versions_until_s = now + _VERSIONS_FOR_S
            with contextlib.closing(WeightSyncClient(services[0])) as weightsync:
                self._versions = await _ask(weightsync, job_id)
        return self._versions


async def _ask(weightsync: WeightSyncClient, job_id: str) -> Versions:
    try:
        answer = await weightsync.list_versions(job_id, deadline_s=_ANSWER_S)
    except grpc.aio.AioRpcError as error:
        logger.info("workers are listed without versions: the weight-sync service failed: %s", error.details())
        return {}
    versions: Versions = {}
    for engine in answer.engines:
        served = controller_pb2.HeldVersion(stream=engine.stream, state=engine.state, last_error=engine.last_error)
        if engine.HasField("version"):
            served.version = engine.version
        versions.setdefault(engine.engine_id, []).append(served)
    return versions


def _health(
    worker: AttachedWorker, alive: bool, versions: list[controller_pb2.HeldVersion]
) -> controller_pb2.WorkerHealth.ValueType:
    if not alive:
        return controller_pb2.WORKER_HEALTH_LOST
    policy = (served.state for served in versions if served.stream == policy_pb2.WEIGHT_STREAM_POLICY)
    if weightsync_pb2.ENGINE_STATE_QUARANTINED in policy:
        return controller_pb2.WORKER_HEALTH_QUARANTINED
    silent_s = (time.time_ns() - worker.progress_unix_ns) / 1e9
    busy = worker.heartbeat.activity not in ("", "idle")
    if busy and worker.progress_unix_ns and silent_s > STUCK_AFTER_S:
        return controller_pb2.WORKER_HEALTH_STUCK
    return controller_pb2.WORKER_HEALTH_GOOD
