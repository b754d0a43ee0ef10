"""Waits for the workers without which a job cannot run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from miles.rpc.gen import controller_pb2
from miles.services.controller.clients import deadlines
from miles.services.controller.jobs.controls import JobControls
from miles.services.controller.status.run_status import RunStatus
from miles.services.controller.workers.registry import AttachedWorker, WorkerRegistry
from miles.services.controller.workers.reward_addresses import RewardAddresses

if TYPE_CHECKING:
    from miles.config.sections.reward import RewardConfig


class RequiredWorkers:
    """Waits for workers, unless the user ends the job first; `status` shows for which."""

    def __init__(self, registry: WorkerRegistry, controls: JobControls, status: RunStatus) -> None:
        self._registry = registry
        self._controls = controls
        self._status = status

    async def wait_for(self, kind: controller_pb2.WorkerKind.ValueType) -> Sequence[AttachedWorker]:
        """Return the attached workers of a kind, at least one; raises as `JobControls.check`, and TimeoutError."""
        if not self._registry.alive(kind):
            name = controller_pb2.WorkerKind.Name(kind).removeprefix("WORKER_KIND_").lower()
            self._status.enter("starting", f"a {name} worker to attach")
        return await self._controls.unless_ended(self._registry.require(kind, 1, deadlines.WORKERS_ATTACH_S))

    async def reward_addresses(self, reward: RewardConfig) -> RewardAddresses:
        """Return the user's reward services, and this cluster's workers if rm_type or custom_rm_path needs them."""
        addresses = reward.service_addresses
        if not (reward.rm_type or reward.custom_rm_path):
            return RewardAddresses(addresses)
        workers = await self.wait_for(controller_pb2.WORKER_KIND_REWARD)
        return RewardAddresses(addresses, tuple(worker.registration.address for worker in workers))
