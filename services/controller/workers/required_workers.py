"""Waits for the workers without which a job cannot run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from miles.rpc.gen import controller_pb2
from miles.services.controller.clients import deadlines
from miles.services.controller.jobs.controls import JobControls
from miles.services.controller.jobs.resources import missing_nodes, missing_reward, serves
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
        name = controller_pb2.WorkerKind.Name(kind).removeprefix("WORKER_KIND_").lower()
        return await self._require(kind, f"a {name} worker to attach", lambda worker: True)

    async def trainer(self, nodes: int) -> AttachedWorker:
        """Return the trainer once it is attached; of several nodes, the status shows those that are not there."""
        kind = controller_pb2.WORKER_KIND_TRAINER
        if nodes > 1:  # a person may have to bring one back
            end = time.monotonic() + deadlines.NODES_ATTACH_S
            while not self._registry.alive(kind) and time.monotonic() < end:
                self._status.enter("gathering", _waiting_for_nodes(nodes, nodes_of_trainer(self._registry)))
                await self._controls.unless_ended(self._registry.wait_for_change(1.0))
        return (await self.wait_for(kind))[0]

    async def reward_addresses(self, reward: RewardConfig) -> RewardAddresses:
        """Return the user's reward services, and this cluster's workers if the run needs them."""
        addresses = reward.addresses_with_default()
        if not reward.scored_here:
            return RewardAddresses(addresses)
        own = reward.rm_type or reward.custom_rm_path or ""
        workers = await self._require(
            controller_pb2.WORKER_KIND_REWARD,
            missing_reward(own),
            lambda worker: serves(served_rewards(worker.registration), own),
        )
        return RewardAddresses(addresses, tuple(worker.registration.address for worker in workers))

    async def _require(
        self, kind: controller_pb2.WorkerKind.ValueType, what: str, suits: Callable[[AttachedWorker], bool]
    ) -> Sequence[AttachedWorker]:
        if not any(map(suits, self._registry.alive(kind))):
            self._status.enter("starting", what)
        return await self._controls.unless_ended(self._registry.require(kind, what, deadlines.WORKERS_ATTACH_S, suits))


def _waiting_for_nodes(nodes: int, there: Collection[int]) -> str:
    lost = [str(node) for node in range(1, nodes) if node not in there]
    waiting = f"the trainer's {nodes} nodes"
    return f"{waiting}: {missing_nodes(lost, nodes)}" if lost else f"the ranks of {waiting} to start"


def nodes_of_trainer(registry: WorkerRegistry) -> frozenset[int]:
    """Return the trainer's nodes, from 1 on, that are attached."""
    attached = registry.alive(controller_pb2.WORKER_KIND_TRAINER_NODE)
    return frozenset(int(json.loads(worker.registration.info_json)["node"]) for worker in attached)


def served_rewards(registration: controller_pb2.WorkerRegistration) -> tuple[str, ...]:
    """Return the names of the rewards that a worker reports; none when it does not report them."""
    info: dict[str, str | int | float] = json.loads(registration.info_json or "{}")
    return tuple(name.strip() for name in str(info.get("rewards", "")).split(",") if name.strip())
