"""`python -m miles.gateway`: the web page and REST API of a controller."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import pathlib
import socket
from collections.abc import Iterator, Sequence

import uvicorn

from miles.addresses import (
    address_argument,
    is_loopback,
    is_taken,
    join_address,
    listen_argument,
    split_address,
    stands_for_every_interface,
)
from miles.certificates import why_not_pair
from miles.gateway.app import create_app
from miles.gateway.config_policy import resolved_roots
from miles.gateway.connection import Connection
from miles.gateway.keys import KeyFile, KeyFileError
from miles.gateway.options import GatewayOptions
from miles.rpc import ExitCode, ServiceExit, main
from miles.rpc.address_file import write_address

KEYS_ENVIRONMENT = "MILES_KEYS_FILE"
_STOP_GRACE_S = 3
_UNREAD_MS = 60_000
"""How long a client may leave sent data unread before its connection is closed, in milliseconds."""


def parse_flags(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the gateway's command line."""
    parser = argparse.ArgumentParser(prog="python -m miles.gateway", description=__doc__)
    add = parser.add_argument
    where = "where to listen; port 0 picks a free one"
    add("--listen", default="127.0.0.1:8000", type=listen_argument, metavar="HOST:PORT", help=where)
    add("--controller", required=True, type=address_argument, metavar="HOST:PORT", help="address of the controller")
    keys = "file of API keys, made by `miles keys create`; without it only this machine is served, without keys"
    add("--keys-file", type=pathlib.Path, default=os.environ.get(KEYS_ENVIRONMENT), metavar="FILE", help=keys)
    roots = "folder that must contain all files named by jobs; repeatable; without one, jobs can name no files"
    add("--allowed-root", action="append", default=[], metavar="DIR", help=roots)
    add("--runs-dir", metavar="DIR", help="folder for run folders; default: runs below the first allowed root")
    modules = "module or package from which jobs may load functions; repeatable; without one, none"
    add("--allowed-module", action="append", default=[], metavar="MODULE", help=modules)
    flags = "engine setting that jobs may give, e.g. sglang_mem_fraction_static; repeatable"
    add("--allowed-flag", action="append", default=[], metavar="NAME", help=flags)
    add("--max-body-bytes", type=int, default=1 << 20, metavar="N", help="maximum size of a request body, in bytes")
    add(
        "--rate-limit",
        type=float,
        default=200.0,
        metavar="N",
        help="maximum number of requests per second for each key",
    )
    stream = "maximum duration of an event stream, in seconds; readers reconnect by themselves"
    add("--stream-seconds", type=float, default=3600.0, metavar="N", help=stream)
    add("--https-cert", metavar="FILE", help="certificate chain for HTTPS (PEM)")
    add("--https-key", metavar="FILE", help="private key for HTTPS (PEM)")
    add("--address-file", type=pathlib.Path, help="file to write the gateway's address to, as http://HOST:PORT")
    return parser.parse_args(arguments)


def options_of(flags: argparse.Namespace) -> GatewayOptions:
    """Build the options from the command line. Raises ServiceExit for a gateway that would be open to everybody."""
    host = split_address(flags.listen)[0]
    if flags.keys_file is None and not is_loopback(host):
        raise ServiceExit(
            ExitCode.BAD_CONFIG,
            f"--listen {flags.listen} is open to other machines, and there are no API keys; make one with "
            "`miles keys create NAME --keys-file FILE` and give --keys-file FILE, or listen on 127.0.0.1",
        )
    if (flags.https_cert is None) != (flags.https_key is None):
        raise ServiceExit(ExitCode.BAD_CONFIG, "--https-cert and --https-key go together: give both, or neither")
    if flags.https_cert is not None and (problem := why_not_pair(flags.https_cert, flags.https_key)) is not None:
        raise ServiceExit(ExitCode.BAD_CONFIG, f"--https-cert, --https-key: {problem}")
    if flags.keys_file is not None:
        try:
            KeyFile(pathlib.Path(flags.keys_file)).list()
        except (KeyFileError, OSError) as error:
            raise ServiceExit(ExitCode.BAD_CONFIG, str(error)) from error
    roots = resolved_roots(flags.allowed_root)
    runs_dir = resolved_roots([flags.runs_dir])[0] if flags.runs_dir else roots[0] / "runs" if roots else None
    return GatewayOptions(
        controller=flags.controller,
        host=host,
        keys_file=None if flags.keys_file is None else pathlib.Path(flags.keys_file),
        allowed_roots=roots,
        runs_dir=runs_dir,
        allowed_modules=tuple(flags.allowed_module),
        allowed_passthrough=tuple(flags.allowed_flag),
        max_body_bytes=flags.max_body_bytes,
        requests_per_s=flags.rate_limit,
        stream_s=flags.stream_seconds,
        burst=max(1, round(2 * flags.rate_limit)),
    )


class _Server(uvicorn.Server):
    """A server that leaves signals to `miles.rpc.main`, as every service does."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(flags: argparse.Namespace) -> None:
    """Serve until cancelled."""
    options = options_of(flags)
    listener = listening_socket(flags.listen)
    config = uvicorn.Config(
        create_app(options),
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_certfile=flags.https_cert,
        ssl_keyfile=flags.https_key,
        timeout_graceful_shutdown=_STOP_GRACE_S,
        timeout_keep_alive=30,
    )
    server = _Server(config)
    url = f"{'https' if flags.https_cert else 'http'}://{join_address(options.host, listener.getsockname()[1])}"
    print(f"listening on {url}", flush=True)
    if flags.address_file is not None:
        write_address(flags.address_file, url)
    # Objects created so far are permanent. Collections that scanned them again would pause for about 0.1 s.
    gc.collect()
    gc.freeze()
    serving = asyncio.ensure_future(server.serve([listener]))
    try:
        await asyncio.shield(serving)
    except asyncio.CancelledError:
        server.should_exit = True
        await serving
        raise


def listening_socket(address: str) -> socket.socket:
    """Open a socket that listens on host:port. Raises ServiceExit when that is not possible."""
    host, port = split_address(address)
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        both = family == socket.AF_INET6 and stands_for_every_interface(host) and socket.has_dualstack_ipv6()
        listener = socket.create_server(where, family=family, backlog=2048, dualstack_ipv6=both)
        # Connections inherit it. asyncio does not set it on sockets that it has not created, and without it the body of
        # an answer waits 40 ms for the client to acknowledge the head.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_MS)
        return listener
    except OSError as error:
        if is_taken(error):
            problem = f"cannot listen on {address}: the port is taken; choose another, or port 0 for any free one"
            raise ServiceExit(ExitCode.PORT_IN_USE, problem) from error
        problem = f"cannot listen on {address}: {error.strerror}; give another --listen"
        raise ServiceExit(ExitCode.BAD_CONFIG, problem) from error


if __name__ == "__main__":
    parsed = parse_flags()
    main(lambda: serve(parsed))
