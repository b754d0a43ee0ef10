"""The network interface by which a rank reaches the others: the one on its route to the master."""

from __future__ import annotations

import socket
from collections.abc import Mapping, MutableMapping

import psutil

from miles.addresses import bare_host
from miles.rpc.advertise import local_address

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


def choose_interfaces(environment: MutableMapping[str, str]) -> None:
    """Have gloo and NCCL use the interface on the route to MASTER_ADDR, where the user has not chosen one.

    gloo would take the one that this host's name resolves to, which on many systems is a loopback address, and NCCL the
    first that it finds. Call before the process group is made. NCCL keeps its choice when all ranks are on one host.
    """
    master = environment.get("MASTER_ADDR")
    if master is None:
        return
    addresses = {name: [entry.address for entry in entries] for name, entries in psutil.net_if_addrs().items()}
    found = interface_towards(bare_host(master), int(environment.get("MASTER_PORT", "1")), addresses)
    if found is None:
        return
    environment.setdefault(GLOO, found)
    if _several_hosts(environment):
        environment.setdefault(NCCL, f"={found}")  # exactly this name: NCCL takes names as prefixes


def interface_towards(host: str, port: int, addresses: Mapping[str, list[str]]) -> str | None:
    """Return the name of the interface on the route to a host; None when the host is unknown.

    Args:
        addresses: the addresses of each of this machine's interfaces.
    """
    try:
        mine = local_address(host, port)
    except OSError:  # the rendezvous fails next, and says so
        return None
    return next((name for name, own in addresses.items() if mine in (each.partition("%")[0] for each in own)), None)


def host_name() -> str:
    """Return this host's name, for people."""
    return socket.gethostname()


def _several_hosts(environment: Mapping[str, str]) -> bool:
    return environment.get("LOCAL_WORLD_SIZE") != environment.get("WORLD_SIZE")
