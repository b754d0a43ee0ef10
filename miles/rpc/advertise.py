"""The address under which others reach a service, which may differ from the one it listens on."""

from __future__ import annotations

import argparse
import socket

from miles.addresses import address_argument, join_address, split_address, stands_for_every_interface, why_not_host


def add_advertise_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--advertise`, for `reachable_address`."""
    help_text = (
        "host, or host:port, under which the controller and other services reach this one; default: the address of "
        "--listen, or with --listen 0.0.0.0 this machine's address on the route to the controller"
    )
    parser.add_argument("--advertise", metavar="HOST[:PORT]", type=_advertised, help=help_text)


def reachable_address(bound: str, advertise: str | None, peer: str) -> str:
    """Return host:port under which `peer` (host:port) reaches a service that listens on `bound` (host:port)."""
    host, port = split_address(bound)
    if advertise is not None:
        return join_address(advertise, port) if why_not_host(advertise) is None else advertise
    return join_address(local_address(*split_address(peer)), port) if stands_for_every_interface(host) else bound


def local_address(host: str, port: int) -> str:
    """Return this machine's address on the route to host and port. Connecting a datagram socket sends nothing."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _advertised(text: str) -> str:
    """Check HOST or HOST:PORT, for argparse."""
    if why_not_host(text) is None and not stands_for_every_interface(text):
        return text
    return address_argument(text)
