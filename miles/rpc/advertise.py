"""The address under which others reach a service, which may differ from the one it listens on."""

from __future__ import annotations

import argparse
import socket

_EVERY_INTERFACE = frozenset({"", "0.0.0.0", "[::]", "::"})


def add_advertise_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--advertise`, for `reachable_address`."""
    help_text = (
        "host, or host:port, under which the controller and other services reach this one; default: the address of "
        "--listen, or with --listen 0.0.0.0 this machine's address on the route to the controller"
    )
    parser.add_argument("--advertise", metavar="HOST[:PORT]", help=help_text)


def reachable_address(bound: str, advertise: str | None, peer: str) -> str:
    """Return host:port under which `peer` (host:port) reaches a service that listens on `bound` (host:port)."""
    host, _, port = bound.rpartition(":")
    if advertise is not None:
        named, colon, own_port = advertise.rpartition(":")
        has_port = bool(colon) and own_port.isdigit() and not (":" in named and not named.endswith("]"))
        return advertise if has_port else f"{advertise}:{port}"
    return f"{_local_address(peer)}:{port}" if host in _EVERY_INTERFACE else bound


def _local_address(peer: str) -> str:
    """Return this machine's address on the route to host:port. Connecting a datagram socket sends nothing."""
    host, _, port = peer.rpartition(":")
    family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        found = str(probe.getsockname()[0])
    return f"[{found}]" if ":" in found else found
