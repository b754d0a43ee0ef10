"""Checks whether the GPUs that a run asks for are there, without two owners of one."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.checks.device import visible_gpus
from miles.config.schema.faults import ConfigError, Fault, RunFault
from miles.config.schema.flat_settings import FlatSettings
from miles.config.server_groups import READ, servers_of_service
from miles.placement.deal import Demand, NoRoomError, deal
from miles.placement.nodes import Cluster, local_cluster


def demand_of(s: FlatSettings, cluster: Cluster) -> Demand:
    """Return the GPUs that a configuration, resolved for CUDA, asks for. Raises ConfigError for groups of servers.

    Rollouts of other machines have GPUs of their own; of an assumed cluster's these are known too.
    """
    services = s.rollout_num_workers
    servers = tuple(server.gpus for server in servers_of_service({key: getattr(s, key) for key in READ}))
    elsewhere = s.rollout_external_engine_addrs is not None
    if s.debug_train_only:
        services = 0
    return Demand(
        trainer_nodes=0 if s.debug_rollout_only else s.actor_num_nodes,
        trainer_gpus=s.actor_num_gpus_per_node or 8,
        services=services if cluster.assumed else max(0, services - s.rollout_workers_elsewhere),
        servers=() if elsewhere else servers,
        colocate=s.colocate and not s.debug_rollout_only,
        rollout_gpus_of_node=s.num_gpus_per_node,
    )


def cluster_here(nodes: int) -> Cluster:
    """Return this machine with the GPUs that this process sees, and other nodes like it."""
    return local_cluster(visible_gpus(), nodes)


def gpu_faults(s: FlatSettings, assumed: Cluster | None = None) -> Iterator[Fault]:
    """Yield a fault when the GPUs do not suffice: those of this machine, or of the assumed cluster."""
    if s.device != "cuda":
        return
    cluster = assumed or cluster_here(s.actor_num_nodes)
    if not cluster.gpus:
        yield Fault("device", "cuda", "this machine has no GPU to use", "set it to cpu, or check CUDA_VISIBLE_DEVICES")
        return
    try:
        placement = deal([node.gpus for node in cluster.nodes], demand_of(s, cluster), rollout_nodes=on_nodes(cluster))
    except ConfigError:
        return  # another check reports it
    except NoRoomError as error:
        yield Fault(error.setting, error.value, error.problem, error.remedy)
        return
    others = sum(place.node > 0 for place in placement.rollouts)
    if cluster.assumed and others > s.rollout_workers_elsewhere:
        problem = (
            f"{others} of the rollout services are on other nodes than the launcher, where they are started by hand"
        )
        yield RunFault("rollout_workers_elsewhere", s.rollout_workers_elsewhere, problem, f"set it to {others}")


def on_nodes(cluster: Cluster) -> int | None:
    """Return on how many nodes rollout services can be: a launcher starts its own node's alone, but any can attach."""
    return None if cluster.assumed else 1
