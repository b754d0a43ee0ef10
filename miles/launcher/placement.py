"""Who gets which GPUs in a run: of this machine, or of a cluster that is assumed."""

from __future__ import annotations

from miles.config.checks.gpus import cluster_here, demand_of, on_nodes
from miles.config.job import JobConfig
from miles.config.schema.flat_settings import FlatSettings
from miles.placement.deal import Placement, deal
from miles.placement.nodes import Cluster


def placement_of(config: JobConfig, assumed: Cluster | None = None) -> Placement | None:
    """Return who gets which GPUs; None on CPUs. Raises NoRoomError, which the checks of a configuration report."""
    if config.services.device != "cuda":
        return None
    cluster = assumed or cluster_here(config.cluster.actor_num_nodes)
    nodes = [node.gpus for node in cluster.nodes]
    return deal(nodes, demand_of(settings_of(config), cluster), rollout_nodes=on_nodes(cluster))


def first_gpus(config: JobConfig) -> list[str]:
    """Return the flags of a rollout service that has the first GPUs of a machine of its own."""
    if config.services.device != "cuda":
        return ["--device", config.services.device]
    demand = demand_of(settings_of(config), cluster_here(1))
    return ["--device", "cuda:0", "--num-gpus", str(demand.service_gpus)]


def settings_of(config: JobConfig) -> FlatSettings:
    """Return a configuration as one namespace of settings."""
    sections = (getattr(config, name) for name in type(config).model_fields)
    values = {key: getattr(section, key) for section in sections for key in type(section).model_fields}
    return FlatSettings(values, given=(), invalid=())
