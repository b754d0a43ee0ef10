"""Addresses of Redis servers: checked, and shown without their passwords."""

from __future__ import annotations

import argparse
import urllib.parse

from miles.addresses import stands_for_every_interface, why_not_host

REDIS_URL_VARIABLE = "MILES_REDIS_URL"
"""Environment variable of the controller: everybody on a machine can read command lines, and the URL has a password."""
_SOCKET_PATH_BYTES = 107
_PARAMETERS = frozenset({"db", "username", "password", "client_name"})
"""Every other parameter would replace a setting that the queue depends on, or is unknown."""
_TLS_PARAMETERS = frozenset(
    f"ssl_{name}"
    for name in ("ca_certs", "ca_path", "cert_reqs", "certfile", "check_hostname", "ciphers", "keyfile", "password")
)


def why_not_redis_url(url: str) -> str | None:
    """Return what is wrong with the address of a Redis server, if anything, without the password."""
    if not url.startswith(("redis://", "rediss://", "unix://")):
        return "it must begin with redis://, rediss:// or unix://"
    if any(character.isspace() for character in url):
        return "it has a space in it: write it as %20"
    parts = urllib.parse.urlsplit(url)
    if "@" in parts.path or "@" in parts.query or "#" in url:
        return "a password has its / as %2F, ? as %3F, # as %23 and @ as %40"
    problem = _why_not_socket(parts) if parts.scheme == "unix" else _why_not_server(parts)
    return problem or _why_not_query(parts)


def without_password(url: str) -> str:
    """Return the address without user name, password and parameters."""
    scheme, _, rest = url.partition("://")
    rest = rest.rpartition("@")[2]
    return f"{scheme}://{rest.partition('?')[0]}"


def redis_url_argument(text: str) -> str:
    """Check the address of a Redis server, for argparse."""
    if (problem := why_not_redis_url(text)) is not None:
        raise argparse.ArgumentTypeError(f"{without_password(text)}: {problem}")
    return text


def _why_not_socket(parts: urllib.parse.SplitResult) -> str | None:
    if parts.netloc.rpartition("@")[2] or len(parts.path) < 2:
        return "it must have the absolute path of a socket, after three slashes: unix:///run/redis.sock"
    length = len(urllib.parse.unquote(parts.path).encode())
    if length > _SOCKET_PATH_BYTES:
        return f"its path has {length} bytes, and a socket's has at most {_SOCKET_PATH_BYTES}"
    return None


def _why_not_server(parts: urllib.parse.SplitResult) -> str | None:
    place = parts.netloc.rpartition("@")[2]
    host, colon, port = place.rpartition(":") if not place.endswith("]") else (place, "", "")
    host = host if colon else place
    if not host:
        return f"it has no host: write {parts.scheme}://127.0.0.1:6379/0 for this machine"
    if ":" in host and not host.startswith("["):
        return "an IPv6 host must be in brackets"
    if (problem := why_not_host(urllib.parse.unquote(host))) is not None:
        return problem
    if stands_for_every_interface(host):
        return f"{host} can be listened on, but is not the address of a machine"
    if colon and not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        return f"{port or 'nothing'} is not a port from 1 to 65535"
    database = parts.path.strip("/")
    if database and not (database.isascii() and database.isdigit()):
        return f"{database} is not the number of a database"
    return None


def _why_not_query(parts: urllib.parse.SplitResult) -> str | None:
    for name, value in urllib.parse.parse_qsl(parts.query, keep_blank_values=True):
        if name not in _PARAMETERS | _TLS_PARAMETERS:
            return f"it has the parameter {name}: leave that out"
        if name.startswith("ssl_") and parts.scheme != "rediss":
            return f"it has the parameter {name}, which is of rediss://"
        if name == "db" and not (value.isascii() and value.isdigit()):
            return f"{value or 'nothing'} is not the number of a database"
    return None
