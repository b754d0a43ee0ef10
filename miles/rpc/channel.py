"""Client channels with the options that the servers expect."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import grpc
import grpc.aio

from miles.rpc.server import KEEPALIVE_OPTIONS
from miles.rpc.tls import TlsFiles

RECONNECT_OPTIONS: list[tuple[str, int]] = [
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
]


def connect(address: str) -> grpc.aio.Channel:
    """An asyncio channel to host:port, encrypted as `tls` says; it connects on first use and reconnects by itself."""
    options = [*KEEPALIVE_OPTIONS, *RECONNECT_OPTIONS]
    if (tls := TlsFiles.from_environment()) is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, tls.channel_credentials(), options=[*options, *tls.channel_options()])


@contextlib.contextmanager
def connected(address: str) -> Iterator[grpc.aio.Channel]:
    """`connect`, for one of very many channels of a process, and for a caller who ends the calls made on it.

    grpc.aio closes a channel by looking into the frames of every task of the event loop, for calls to cancel: for
    thousands of channels with a task each, that would hold up the loop for minutes.
    """
    channel = connect(address)
    try:
        yield channel
    finally:
        channel._channel.close()


def connect_blocking(address: str) -> grpc.Channel:
    """A blocking channel to host:port, for code outside an event loop."""
    options = [*KEEPALIVE_OPTIONS, *RECONNECT_OPTIONS]
    if (tls := TlsFiles.from_environment()) is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, tls.channel_credentials(), options=[*options, *tls.channel_options()])


async def wait_ready(channel: grpc.aio.Channel, what: str, deadline_s: float) -> None:
    """Return once the channel is connected; raise `TimeoutError` naming `what` after the deadline."""
    try:
        async with asyncio.timeout(deadline_s):
            await channel.channel_ready()
    except TimeoutError:
        raise TimeoutError(f"waited {deadline_s:g} s for {what} to accept connections") from None
