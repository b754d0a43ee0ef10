"""Addresses of services, HOST:PORT: splits, joins and checks them. An IPv6 host is in brackets there.

Nothing is resolved or connected to here, except by `why_not_bindable`.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import ipaddress
import re
import socket

LOOPBACK = "127.0.0.1"
_EVERY_INTERFACE = frozenset({"0.0.0.0", "::"})
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")


def split_address(address: str) -> tuple[str, int]:
    """Return host, without brackets, and port of a well-formed HOST:PORT."""
    host, _, port = address.rpartition(":")
    return bare_host(host), int(port)


def join_address(host: str, port: int) -> str:
    """Return HOST:PORT, with an IPv6 host in brackets."""
    name = bare_host(host)
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def bare_host(host: str) -> str:
    """Return a host without the brackets of IPv6, as sockets want it."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address or host name."""
    name = bare_host(host)
    if name.lower().rstrip(".") in ("localhost", "ip6-localhost"):
        return True
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(name)
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return (mapped or address).is_loopback
    return False


def stands_for_every_interface(host: str) -> bool:
    """Return whether a host can be listened on, but is the name of no machine: 0.0.0.0 and ::."""
    with contextlib.suppress(ValueError):
        return bare_host(host) == "" or str(ipaddress.ip_address(bare_host(host))) in _EVERY_INTERFACE
    return False


def reachable_here(address: str) -> str:
    """Return the HOST:PORT under which this machine reaches a service of its own that listens on `address`."""
    host, port = split_address(address)
    if not stands_for_every_interface(host):
        return join_address(host, port)
    return join_address("::1" if ":" in host else LOOPBACK, port)


def why_not_host(host: str) -> str | None:
    """Return what is wrong with a host, if anything: a name, an IPv4 address, or IPv6 with or without brackets.

    The text has the remedy where it is not plain.
    """
    if (problem := _why_not_plain(host)) is not None:
        return problem
    if not host.isascii():
        return f"a host name has ASCII letters only{_ascii_form(host)}"
    if host.startswith("[") or ":" in host:
        return _why_not_ipv6(host)
    labels = host.removesuffix(".").split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        return f"{host or 'it'} is no host name: letters, digits, dashes and dots"
    if labels[-1].isdigit():  # no top-level domain is a number
        with contextlib.suppress(ValueError):
            ipaddress.IPv4Address(host)
            return None
        return f"{host} is no IPv4 address"
    return None


def why_not_address(address: str, *, listen: bool = False) -> str | None:
    """Return what is wrong with HOST:PORT, if anything. With `listen` port 0 and every interface are allowed."""
    if (problem := _why_not_plain(address)) is not None:
        return problem
    host, colon, port = address.rpartition(":")
    if not colon or address.endswith("]"):
        return f"it has no port: write {join_address(address, 9000)}" if address else "it is empty"
    if not host:
        return f"it has no host: write {LOOPBACK}:{port} for this machine"
    if ":" in host and not host.startswith("["):
        return f"an IPv6 host must be in brackets: write [{host}]:{port}"
    if not port.isascii() or not port.isdigit() or not (0 if listen else 1) <= int(port) <= 65535:
        return f"{port or 'nothing'} is not a port from {0 if listen else 1} to 65535"
    if (problem := why_not_host(host)) is not None:
        return problem
    if not listen and stands_for_every_interface(host):
        return f"{host} can be listened on, but is not the address of a machine; write {LOOPBACK} for this one"
    return None


def address_argument(text: str) -> str:
    """Check HOST:PORT of a service to connect to, for argparse."""
    return _checked(text, why_not_address(text))


def listen_argument(text: str) -> str:
    """Check HOST:PORT to listen on, for argparse."""
    return _checked(text, why_not_address(text, listen=True))


def why_not_bindable(host: str, port: int) -> OSError | None:
    """Return the error of listening on a host, with or without brackets, and port of this machine, if there is one."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(bare_host(host), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free to a server
            probe.bind(where)
            probe.listen()  # two sockets may be bound to one port, but not listen on it
    except OSError as error:
        return error
    return None


def is_taken(error: OSError) -> bool:
    """Return whether the cause is that somebody else listens on the port."""
    return error.errno == errno.EADDRINUSE


def free_port(host: str = LOOPBACK) -> int:
    """Return a port of one of this machine's addresses that was free a moment ago."""
    family, kind, protocol, _, where = socket.getaddrinfo(bare_host(host), 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.bind(where)
        return int(probe.getsockname()[1])


def _why_not_plain(text: str) -> str | None:
    """Return what shows that a text is no host and no HOST:PORT."""
    if (scheme := _SCHEME.match(text)) is not None:
        return f"it begins with {scheme[0]}: leave that out"
    if any(character.isspace() or not character.isprintable() for character in text):
        return "it has a space in it"
    for character, what in (("/", "a path"), ("@", "a user name"), ("?", "a query"), (",", "a comma")):
        if character in text:
            return f"it has {what} in it, from {character} on: leave that out"
    return None


def _why_not_ipv6(host: str) -> str | None:
    with contextlib.suppress(ValueError):
        ipaddress.IPv6Address(bare_host(host))
        return None
    name, _, port = host.rpartition(":")
    if port.isdigit() and why_not_host(name) is None:
        return f"it has a port: leave :{port} out"
    return f"{host} is no IPv6 address"


def _ascii_form(host: str) -> str:
    with contextlib.suppress(UnicodeError):
        return f": write {host.encode('idna').decode()}"
    return ""


def _checked(text: str, problem: str | None) -> str:
    if problem is not None:
        raise argparse.ArgumentTypeError(f"{text}: {problem}")
    return text
