"""Deals GPU numbers to the trainer's ranks and the rollout services, so that no GPU has two owners.

The trainer comes first: the first GPUs of the first nodes, of which the launcher's is one. Each rollout service gets
consecutive GPUs of one node, because it starts its servers there: on the trainer's node while GPUs are left, else on
the next. With `colocate` services share the trainer's GPUs: each another part of them, or, of more services than there
are parts, some the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Demand:
    """What a run asks for."""

    trainer_nodes: int
    trainer_gpus: int
    """On each of the trainer's nodes."""
    services: int
    """Rollout services."""
    servers: tuple[int, ...]
    """GPUs of each engine of a service: their tensor-parallel sizes; empty for engines that run elsewhere."""
    colocate: bool = False
    rollout_gpus_of_node: int | None = None
    """Most GPUs of a node that rollout services get; None: all."""

    @property
    def service_gpus(self) -> int:
        """Of each rollout service."""
        return sum(self.servers)

    @property
    def engine_gpus(self) -> int:
        """Of the largest engine; 0 for engines that run elsewhere."""
        return max(self.servers, default=0)

    @property
    def rollout_gpus(self) -> int:
        """Of all rollout services."""
        return self.services * self.service_gpus


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """GPUs of one node."""

    node: int
    gpus: tuple[int, ...]
    """Their numbers there, consecutive."""


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """What everybody gets."""

    trainer: tuple[Place, ...]
    """For each node of the trainer; a GPU for each rank."""
    rollouts: tuple[Place, ...]
    """For each rollout service; its engines take its GPUs in order."""


class NoRoomError(ValueError):
    """There are too few GPUs, or they are on the wrong nodes."""

    def __init__(self, setting: str, value: int, problem: str, remedy: str) -> None:
        super().__init__(f"{setting} = {value}, but {problem}; {remedy}")
        self.setting, self.value, self.problem, self.remedy = setting, value, problem, remedy


def deal(nodes: Sequence[int], demand: Demand, *, rollout_nodes: int | None = None) -> Placement:
    """Return who gets which GPUs.

    Args:
        nodes: GPUs of each node.
        demand: what is asked for.
        rollout_nodes: how many nodes, from the first, rollout services can be started on; None: all.

    Raises NoRoomError with the setting to change.
    """
    trainer = _trainer(nodes, demand)
    pool = _pool(nodes, demand, trainer, rollout_nodes)
    free = {node: list(gpus) for node, gpus in pool.items()}
    rollouts = []
    for _ in range(demand.services):
        node = _with_room(free, demand)
        if node is None and demand.colocate:
            free = {node: list(gpus) for node, gpus in pool.items()}  # from the first GPU again
            node = _with_room(free, demand)
        if node is None:
            raise _no_room(nodes, demand, sum(map(len, pool.values())), rollout_nodes)
        rollouts.append(Place(node, tuple(free[node][: demand.service_gpus])))
        del free[node][: demand.service_gpus]
    return Placement(trainer, tuple(rollouts))


def _pool(
    nodes: Sequence[int], demand: Demand, trainer: Sequence[Place], rollout_nodes: int | None
) -> dict[int, Sequence[int]]:
    """Return the GPUs by node that rollout services may have: those of the trainer, or all others."""
    taken = {place.node: len(place.gpus) for place in trainer}
    most = demand.rollout_gpus_of_node
    if demand.colocate:
        return {node: range(taken.get(node, 0))[:most] for node in range(len(nodes[:rollout_nodes]))}
    return {node: range(taken.get(node, 0), count)[:most] for node, count in enumerate(nodes[:rollout_nodes])}


def _with_room(free: Mapping[int, Sequence[int]], demand: Demand) -> int | None:
    return next((node for node, left in free.items() if len(left) >= demand.service_gpus), None)


def _trainer(nodes: Sequence[int], demand: Demand) -> tuple[Place, ...]:
    count, own = demand.trainer_nodes, nodes[: demand.trainer_nodes]
    if len(own) < count:
        problem = f"there {'is 1 node' if len(nodes) == 1 else f'are {len(nodes)} nodes'}"
        raise NoRoomError("actor_num_nodes", count, problem, f"set it to {len(nodes)}, or use more nodes")
    small = next((node for node, gpus in enumerate(own) if gpus < demand.trainer_gpus), None)
    if small is not None:
        problem, remedy = f"node {small} has {_gpus(nodes[small])}", f"set it to at most {min(own)}"
        raise NoRoomError("actor_num_gpus_per_node", demand.trainer_gpus, problem, f"{remedy}, and use more nodes")
    return tuple(Place(node, tuple(range(demand.trainer_gpus))) for node in range(count))


def _no_room(nodes: Sequence[int], demand: Demand, free: int, rollout_nodes: int | None) -> NoRoomError:
    largest, most = max(nodes[:rollout_nodes]), demand.rollout_gpus_of_node
    if demand.engine_gpus > largest:
        problem = f"a server's GPUs are on one node, and the largest has {_gpus(largest)}"
        elsewhere = "start the server over several nodes yourself and name it in rollout_external_engine_addrs"
        return NoRoomError("rollout_num_gpus_per_engine", demand.engine_gpus, problem, f"lower it, or {elsewhere}")
    if most is not None and most < largest:
        unlimited = dataclasses.replace(demand, rollout_gpus_of_node=None)
        if demand.service_gpus > most or _fits(nodes, unlimited, rollout_nodes):
            problem = f"a rollout service has {_gpus(demand.service_gpus)} of one node, and rollouts {free} of all"
            return NoRoomError("num_gpus_per_node", most, problem, "raise it, or use fewer GPUs for rollouts")
    if demand.rollout_gpus <= free:
        problem = f"each service's {_gpus(demand.service_gpus)} are on one node, and no node has as many left"
        most = max(1, largest // demand.engine_gpus) * demand.engine_gpus
        services = max(2, -(-demand.rollout_gpus // most))
        return NoRoomError("rollout_num_workers", demand.services, problem, f"set it to {services} or more")
    by_service = demand.services > 1 and demand.service_gpus == 1
    setting = "rollout_num_workers" if by_service else "rollout_num_gpus"
    if demand.colocate:
        problem = f"a service's {_gpus(demand.service_gpus)} are on one node, where colocate leaves the trainer's alone"
        remedy = "raise rollout_num_workers, or lower it"
        return NoRoomError("rollout_num_gpus", demand.rollout_gpus, problem, remedy)
    trainers = demand.trainer_nodes * demand.trainer_gpus
    problem = f"the trainer's {trainers} leave {free} of the {sum(nodes)} GPUs"
    if rollout_nodes is not None and rollout_nodes < len(nodes):
        problem = f"the trainer leaves {free} of this node's {_gpus(nodes[0])}"
    remedy = (
        "turn colocate on so that they take turns, lower it or actor_num_gpus_per_node, start some on other nodes "
        "(rollout_workers_elsewhere), or name servers there in rollout_external_engine_addrs"
    )
    return NoRoomError(setting, demand.rollout_gpus, problem, remedy)


def _fits(nodes: Sequence[int], demand: Demand, rollout_nodes: int | None) -> bool:
    try:
        deal(nodes, demand, rollout_nodes=rollout_nodes)
    except NoRoomError:
        return False
    return True


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"
