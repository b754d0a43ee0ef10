"""The address under which other machines reach this one."""

from __future__ import annotations

from miles.addresses import is_loopback

_ELSEWHERE = ("198.51.100.1", "2001:db8::1")
"""Addresses for documentation (RFC 5737, RFC 3849): nobody's, so the way there is the default route."""


def own_address() -> str | None:
    """Return this machine's address on its default route; None when it has no such route. Sends nothing."""
    from miles.rpc.advertise import local_address

    for destination in _ELSEWHERE:
        try:
            address = local_address(destination, 9)
        except OSError:
            continue
        if not is_loopback(address):
            return address
    return None
