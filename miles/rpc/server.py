"""The gRPC server of every service: health, reflection, keepalive, and graceful shutdown."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
from collections.abc import Awaitable, Callable, Sequence

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from miles.addresses import is_taken, join_address, split_address, why_not_bindable
from miles.rpc.exit_codes import ExitCode, ServiceExit
from miles.rpc.tls import TlsFiles
from miles.standard_streams import outlive_readers
from miles.telemetry.redaction import RedactingFormatter
from miles.threads import guard_threads

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 << 20
KEEPALIVE_OPTIONS: list[tuple[str, int]] = [
    ("grpc.keepalive_time_ms", 30_000),  # below the idle limit of common cloud load balancers
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]
NO_BANDWIDTH_PROBES: list[tuple[str, int]] = [("grpc.http2.bdp_probe", 0)]
"""For whoever receives short messages on many connections. By default gRPC answers data that arrives with a ping, to
learn how much it may let the sender send ahead, and the sender answers that: on a connection with a message now and
then, each side takes a third of its CPU time for it. Bulk data over a long way needs the probes."""
STOP_LIMIT_S = 60.0
"""How long a graceful shutdown may take before the process is ended."""
WATCHED_PID_ENVIRONMENT = "MILES_EXIT_WITH"


async def start_server(
    register: Callable[[grpc.aio.Server], None],
    address: str,
    service_names: Sequence[str],
    *,
    bandwidth_probes: bool = True,
) -> tuple[grpc.aio.Server, str]:
    """Start a server for the servicers that `register` adds; return it and the host:port it listens on.

    `address` is host:port; port 0 picks a free one. Connections are encrypted when `tls` finds certificates. Without
    `bandwidth_probes`, what clients send is taken to be short messages. Raises `ServiceExit` when the port is taken or
    the certificates cannot be read.
    """
    probes = [] if bandwidth_probes else NO_BANDWIDTH_PROBES
    server = grpc.aio.server(options=[*KEEPALIVE_OPTIONS, *probes, ("grpc.so_reuseport", 0)])
    register(server)
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection(
        (*service_names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME), server
    )
    tls = TlsFiles.from_environment()
    credentials = None if tls is None else tls.server_credentials()
    host, wanted = split_address(address)
    where = join_address(host, wanted)
    try:
        port = server.add_insecure_port(where) if credentials is None else server.add_secure_port(where, credentials)
    except RuntimeError as error:
        raise _cannot_listen(host, wanted) from error
    await server.start()
    for name in ("", *service_names):
        await health.set(name, health_pb2.HealthCheckResponse.SERVING)
    return server, join_address(host, port)


def _cannot_listen(host: str, port: int) -> ServiceExit:
    where, cause = join_address(host, port), why_not_bindable(host, port)
    if cause is not None and not is_taken(cause):
        return ServiceExit(ExitCode.BAD_CONFIG, f"cannot listen on {where}: {cause.strerror}; give another --listen")
    problem = f"cannot listen on {where}: the port is taken; choose another or use port 0"
    return ServiceExit(ExitCode.PORT_IN_USE, problem)


def _allow_many_files() -> None:
    """Raise the limit of open files to its maximum: each connection is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def run_until_signal(serve: Callable[[], Awaitable[None]]) -> None:
    """Run `serve` until it returns or SIGINT, SIGTERM or SIGHUP cancels it, then let it clean up.

    A hangup is ignored where it was at the start (`nohup`).

    With a process id in MILES_EXIT_WITH, the end of that process counts as a signal, so that a killed launcher leaves
    nothing running.
    """
    loop = asyncio.get_running_loop()
    guard_threads(loop)
    task = asyncio.ensure_future(serve())
    asked_to_stop = False

    def stop() -> None:
        nonlocal asked_to_stop
        if not asked_to_stop:
            loop.call_later(STOP_LIMIT_S, end_process)
        asked_to_stop = True
        task.cancel()

    def end_process() -> None:
        logger.error("the service did not end within %g s of being asked to; ending it", STOP_LIMIT_S)
        os._exit(int(ExitCode.INTERNAL))

    for number in stop_signals():
        loop.add_signal_handler(number, stop)
    watched = _watch_process(loop, stop)
    try:
        await task
    except asyncio.CancelledError:
        if not asked_to_stop:
            raise ServiceExit(ExitCode.INTERNAL, "the service was cancelled from within") from None
    finally:
        if watched is not None:
            loop.remove_reader(watched)
            os.close(watched)


def stop_signals() -> list[signal.Signals]:
    """Return the signals that ask a program to stop: a hangup too, unless it is ignored (`nohup`)."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


def _watch_process(loop: asyncio.AbstractEventLoop, on_end: Callable[[], None]) -> int | None:
    """Call `on_end` when the process of MILES_EXIT_WITH ends; return the watched descriptor."""
    pid = os.environ.get(WATCHED_PID_ENVIRONMENT)
    if pid is None:
        return None
    try:
        descriptor = os.pidfd_open(int(pid))
    except ProcessLookupError:
        loop.call_soon(on_end)
        return None

    def ended() -> None:
        loop.remove_reader(descriptor)
        on_end()

    loop.add_reader(descriptor, ended)
    return descriptor


def main(serve: Callable[[], Awaitable[None]]) -> None:
    """Run a service as a program: logging, signals, exit codes."""
    outlive_readers()
    _allow_many_files()
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        asyncio.run(run_until_signal(serve))
    except ServiceExit as error:
        logger.error("%s", error)
        raise SystemExit(int(error.code)) from error
