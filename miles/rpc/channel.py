"""Client channels with the options that our servers expect."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import grpc
import grpc.aio

from miles.rpc.server import KEEPALIVE_OPTIONS, NO_BANDWIDTH_PROBES
from miles.rpc.tls import TlsFiles

RECONNECT_OPTIONS: list[tuple[str, int]] = [
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # how long one attempt may take: a busy server answers late
    ("grpc.max_reconnect_backoff_ms", 5_000),
]
_NO_PROXY: list[tuple[str, int]] = [("grpc.enable_http_proxy", 0)]
"""A proxy of the environment leads out of the cluster; services reach each other without one."""


def connect(address: str, *, bandwidth_probes: bool = True) -> grpc.aio.Channel:
    """Open an asyncio channel to host:port, encrypted as `tls` says; it connects on first use and reconnects.

    Without `bandwidth_probes`, what the server sends is taken to be short messages.
    """
    options = [*KEEPALIVE_OPTIONS, *RECONNECT_OPTIONS, *_NO_PROXY, *([] if bandwidth_probes else NO_BANDWIDTH_PROBES)]
    if (tls := TlsFiles.from_environment()) is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, tls.channel_credentials(), options=[*options, *tls.channel_options()])


@contextlib.contextmanager
def connected(address: str) -> Iterator[grpc.aio.Channel]:
    """Open a channel for short messages, as one of thousands of a process; the caller ends the calls on it.

    When grpc.aio closes a channel, it looks for calls to cancel in the frames of every task of the event loop. With
    thousands of channels and a task for each, that would block the loop for minutes.
    """
    channel = connect(address, bandwidth_probes=False)
    with contextlib.closing(channel._channel):
        yield channel


def connect_blocking(address: str) -> grpc.Channel:
    """Open a blocking channel to host:port, for code outside an event loop."""
    options = [*KEEPALIVE_OPTIONS, *RECONNECT_OPTIONS, *_NO_PROXY]
    if (tls := TlsFiles.from_environment()) is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, tls.channel_credentials(), options=[*options, *tls.channel_options()])


async def wait_ready(channel: grpc.aio.Channel, what: str, deadline_s: float) -> None:
    """Wait until the channel is connected; raise TimeoutError, which names `what`, after the deadline."""
    try:
        async with asyncio.timeout(deadline_s):
            await channel.channel_ready()
    except TimeoutError:
        raise TimeoutError(f"waited {deadline_s:g} s for {what} to accept connections") from None
