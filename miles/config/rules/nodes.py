"""Rules about runs on several machines."""

from __future__ import annotations

from collections.abc import Iterator

from miles.addresses import is_loopback, stands_for_every_interface, why_not_host
from miles.config.rules.registry import rule
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings, InvalidSetting


@rule
def other_machines_reach_the_host(s: FlatSettings) -> Iterator[Fault]:
    if (why := _on_other_machines(s)) is None or why_not_host(s.host) is not None:
        return
    if is_loopback(s.host):
        problem = f"{why}, and only this machine reaches it there"
    elif stands_for_every_interface(s.host):
        problem = f"{why}, and it is the address of no machine"
    else:
        return
    yield Fault("host", s.host, problem, "set it to this machine's address or name in the network of the others")


@rule
def some_rollouts_are_elsewhere(s: FlatSettings) -> Iterator[Fault]:
    if s.rollout_workers_elsewhere > s.rollout_num_workers:
        problem = f"rollout_num_workers = {s.rollout_num_workers} counts those too"
        yield Fault("rollout_workers_elsewhere", s.rollout_workers_elsewhere, problem, "raise rollout_num_workers")


@rule
def a_rendezvous_has_several_ranks(s: FlatSettings) -> Iterator[Fault]:
    if s.trainer_master_port and s.actor_num_nodes * (s.actor_num_gpus_per_node or 2) == 1:
        problem = "one rank meets no others"
        yield Fault("trainer_master_port", s.trainer_master_port, problem, "leave it out, or raise actor_num_nodes")


def reached_by_others(s: FlatSettings) -> bool:
    """Return whether services on other machines reach the host; False where that cannot be read."""
    try:
        return _on_other_machines(s) is not None
    except InvalidSetting:
        return False


def _on_other_machines(s: FlatSettings) -> str | None:
    if s.actor_num_nodes > 1:
        return f"actor_num_nodes = {s.actor_num_nodes} has services on other machines"
    if s.rollout_workers_elsewhere:
        return f"rollout_workers_elsewhere = {s.rollout_workers_elsewhere} has services on other machines"
    return None
