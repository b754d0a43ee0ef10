"""TCP keepalive: the kernel finds out whether the other end of a quiet connection is still there."""

from __future__ import annotations

import socket

_PROBES = 4
"""Probes without an answer after which a connection counts as broken."""


def probe_peer(connection: socket.socket, silence_s: float) -> None:
    """Have a connection break once the other host has not answered for `silence_s`, in whole seconds, at least 5.

    A process that is busy or stopped does not count: its kernel answers.
    """
    interval_s = max(1, round(silence_s / (_PROBES + 1)))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(silence_s * 1000))
