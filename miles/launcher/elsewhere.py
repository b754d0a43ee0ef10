"""What belongs to a run and is started on other hosts: the trainer's other nodes, and rollouts."""

from __future__ import annotations

import shlex
from collections.abc import Collection

from miles.addresses import bare_host
from miles.config.job import JobConfig
from miles.launcher.placement import first_gpus
from miles.launcher.plan import (
    ProcessPlan,
    engine_addresses,
    rollouts_here,
    tls_environment,
    trainer_flags,
    trainer_node,
)
from miles.placement.deal import Placement
from miles.telemetry.redaction import REDACTED


def plan_elsewhere(config: JobConfig, controller: str, placement: Placement | None = None) -> list[ProcessPlan]:
    """Plan what is started on other hosts; the name says where. `controller` is its host:port.

    With a `placement` of all services the nodes of rollouts are known too.
    """
    environment = tls_environment(config)
    nodes = config.cluster.actor_num_nodes
    plans = []
    for rank in range(1, nodes if config.debug.has_trainer else 1):
        name = f"the trainer's node {rank} of {nodes}"
        command = (*_trainer_node(config, rank, controller), *trainer_flags(config))
        variables = {**environment, **config.train.train_env_vars}
        plans.append(ProcessPlan(name, "trainer", command, variables, {}, node=rank))
    for index in range(rollouts_here(config), config.cluster.rollout_num_workers if config.debug.has_engines else 0):
        command = _rollout(config, index, controller)
        places = () if placement is None else placement.rollouts[index : index + 1]
        node = places[0].node if places else 0
        name = f"rollout-{index}, on {f'node {node}' if places else 'any host'}"
        plans.append(ProcessPlan(name, "rollout", command, environment, {}, node=node))
    return plans


def command_line(plan: ProcessPlan, secret: Collection[str] = ()) -> str:
    """Return the command with its variables as a shell takes it; the values of `secret` variables are left out."""
    variables = [f"{name}={REDACTED if name in secret else shlex.quote(v)}" for name, v in plan.environment.items()]
    return " ".join([*variables, shlex.join(plan.command)])


def _trainer_node(config: JobConfig, rank: int, controller: str) -> tuple[str, ...]:
    node = trainer_node(config, rank)
    return (
        *("miles", "trainer-node", "--nodes", str(node.count), "--node-rank", str(node.rank)),
        *("--ranks-per-node", str(node.ranks), "--master", node.master, "--controller", controller),
    )


def _rollout(config: JobConfig, index: int, controller: str) -> tuple[str, ...]:
    every_interface = "[::]:0" if ":" in bare_host(config.services.host) else "0.0.0.0:0"
    return (
        *("python", "-m", "miles.services.rollout", "--listen", every_interface, "--controller", controller),
        *("--worker-id", f"rollout-{index}", *first_gpus(config)),
        *engine_addresses(config, index),
    )
