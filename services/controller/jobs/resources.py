"""Decides whether the workers that a job needs are attached. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Supply:
    """The workers that are attached."""

    rollouts: int = 0
    weightsyncs: int = 0
    trainer_ranks: Collection[int] = ()
    """Ranks of each trainer; 0 for one that does not report them."""
    trainer_nodes: Collection[int] = ()
    """Nodes, from 1 on, of which `miles trainer-node` runs the ranks."""
    rewards: Collection[Collection[str]] = ()
    """Names that each reward worker serves; empty for one that does not report them."""


def lacking(config: Mapping[str, Any], supply: Supply, *, starting_up: bool = False) -> str:
    """Return what a job with this flat configuration waits for, in words; empty when it can run.

    While services are `starting_up`, workers that have not attached are not missed yet, but a reward that those which
    have attached do not serve is. Those on other nodes are started by hand, and are missed at once.
    """
    nodes = config["actor_num_nodes"]
    has_trainer, has_engines = not config.get("debug_rollout_only"), not config.get("debug_train_only")
    if starting_up and nodes == 1:
        return _lacking_reward(config, supply) if supply.rewards and has_engines else ""
    missing: list[str] = []
    wanted = config["rollout_num_workers"]
    if has_engines and supply.rollouts < wanted:
        missing.append(f"{wanted} rollout workers ({supply.rollouts} attached)")
    ranks = nodes * (config["actor_num_gpus_per_node"] or 1)
    if has_trainer and not any(have in (0, ranks) for have in supply.trainer_ranks):
        attached = ", ".join(map(str, supply.trainer_ranks)) or "no trainer"
        missing.append(f"a trainer of {ranks} ranks ({attached} attached{_lacking_nodes(nodes, supply)})")
    if not supply.weightsyncs:
        missing.append("a weight-sync service")
    if has_engines and (reward := _lacking_reward(config, supply)):
        missing.append(reward)
    return "; ".join(missing)


def _lacking_nodes(nodes: int, supply: Supply) -> str:
    """Name the trainer's nodes that are not there; empty when all are."""
    lost = [str(node) for node in range(1, nodes) if node not in supply.trainer_nodes]
    return f"; {missing_nodes(lost, nodes)}" if lost else ""


def missing_nodes(lost: Collection[str], nodes: int) -> str:
    """Say which of a trainer's nodes are missing, and the way out."""
    names = f"node{'s' * (len(lost) > 1)} {', '.join(lost)} of {nodes}"
    return f"{names} not there: start `miles trainer-node` as the launcher printed it"


def _lacking_reward(config: Mapping[str, Any], supply: Supply) -> str:
    services = config["reward_service"] or ()
    name = config["rm_type"] or config["custom_rm_path"] or ""
    if (services and not name) or any(service.startswith("default=") for service in services):
        return ""
    if any(serves(served, name) for served in supply.rewards):
        return ""
    return missing_reward(name)


def serves(served: Collection[str], reward: str) -> bool:
    """Return whether a reward worker that reports these names serves a reward; one that reports none serves any.

    An empty reward is whatever rows name.
    """
    own_name = reward.rpartition(".")[2]  # of a function
    return not reward or not served or reward in served or own_name in served


def missing_reward(reward: str) -> str:
    """Name a reward that no worker serves, and the way out."""
    if not reward:
        return "a reward worker"
    if "." not in reward:
        return f"a reward worker that serves {reward}"
    start = f"python -m miles.services.reward --custom-rm-path {reward} --controller HOST:PORT"
    return f"a reward worker that serves {reward} (give miles serve --custom-rm-path {reward}, or start one: {start})"
