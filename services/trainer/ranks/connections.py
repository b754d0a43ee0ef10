"""Connections between rank 0 and every other rank, by which each side notices that the other is gone.

Nothing is sent over them but who is there and, at last, that rank 0 ends in order. The kernel probes each one (TCP
keepalive), so a rank that computes for minutes stays alive, one whose process has ended is known at once, and one whose
host or link is gone after `silence_s`. A collective would wait for its own timeout, and a rank that waits for a command
for half an hour.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from miles.addresses import bare_host, join_address, split_address
from miles.keepalive import probe_peer
from miles.services.trainer.ranks.network import host_name

_KEY = "miles/ranks"
_ALL_THERE, _END = b"a", b"e"
_HELLO_S = 10.0
_HELLO_BYTES = 1 << 12
_GRACE_S = 1.0
"""How long a closed connection may be explained by an orderly end of this process that has just begun."""


class Store(Protocol):
    """Key-value store of the rendezvous."""

    def set(self, key: str, value: str, /) -> None:
        """Set a key."""

    def get(self, key: str, /) -> bytes:
        """Return a key's value; waits until there is one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Peer:
    """The rank at the other end of a connection."""

    rank: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


class RanksMissingError(RuntimeError):
    """Not every rank has connected to rank 0 in time, or one has ended before all were there."""


class RankConnections:
    """This rank's connections: rank 0 has one to every other rank, and each of these has one to rank 0."""

    def __init__(self, peers: dict[socket.socket, Peer], silence_s: float, on_lost: Callable[[str], None]) -> None:
        """Watch connected sockets from a thread of its own, until `close`; `on_lost` is called with what was lost."""
        self.ended = threading.Event()
        """Set when rank 0 has said that it ends in order."""
        self._peers = peers
        self._silence_s = silence_s
        self._on_lost = on_lost
        self._closing = threading.Event()
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="watch ranks", daemon=True)
        self._thread.start()

    def expect_end(self) -> None:
        """From now on this process ends in order: other ranks may be gone first."""
        self._closing.set()

    def close(self, *, orderly: bool) -> None:
        """Close the connections; with `orderly`, rank 0 has the others end with exit code 0."""
        self._closing.set()
        if self._wake.fileno() < 0:
            return  # a second time
        for connection in self._peers if orderly else ():
            with contextlib.suppress(OSError):
                connection.send(_END)
        self._wake.send(b"w")
        self._thread.join()
        for each in (*self._peers, self._wake, self._woken):
            each.close()

    def fail(self, reason: str) -> None:
        """Report ranks as lost for a reason noticed elsewhere, unless a connection tells why, or this process ends."""
        if not self._closing.wait(2 * _GRACE_S):
            self._on_lost(reason)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for connection in self._peers:
                selector.register(connection, selectors.EVENT_READ, connection)
            while True:
                for key, _ in selector.select():
                    if key.data is None:
                        return
                    selector.unregister(key.fileobj)
                    if (reason := self._why_gone(key.data)) is None:
                        self.ended.set()
                    elif not self._closing.wait(_GRACE_S):
                        self._on_lost(f"{self._peers[key.data]} {reason}")
                        return

    def _why_gone(self, connection: socket.socket) -> str | None:
        """Return why a readable connection is of no use any more; None when it has said that rank 0 ends in order."""
        try:
            return None if connection.recv(1) == _END else "has ended"
        except ConnectionResetError:
            return "has ended"
        except OSError as error:
            return f"cannot be reached: no answer for {self._silence_s:g} s ({error.strerror})"


def connect_ranks(
    store: Store,
    rank: int,
    count: int,
    host: str,
    *,
    silence_s: float,
    deadline_s: float,
    on_lost: Callable[[str], None],
) -> RankConnections:
    """Connect rank 0 with all others; collective. Returns on every rank when all are there.

    Args:
        host: rank 0's name or address, by which every rank reaches it.
        silence_s: without an answer for so long a connection counts as broken, in seconds.
        deadline_s: how long to wait for all ranks, in seconds. Raises RanksMissingError after it.
    """
    if rank:
        peers = _connect(json.loads(store.get(_KEY)), rank, silence_s, deadline_s)
    else:
        with _listener(host, count) as listener:
            token = secrets.token_hex(16)
            address = join_address(host, listener.getsockname()[1])
            store.set(_KEY, json.dumps({"address": address, "token": token, "host": host_name()}))
            peers = _accept(listener, token, count, silence_s, deadline_s)
        for connection in peers:
            connection.send(_ALL_THERE)
    return RankConnections(peers, silence_s, on_lost)


def _listener(host: str, count: int) -> socket.socket:
    """Listen on rank 0's address, or on every interface where that is another machine's, which forwards to this one."""
    family, kind, protocol, _, address = socket.getaddrinfo(bare_host(host), 0, type=socket.SOCK_STREAM)[0]
    with contextlib.ExitStack() as undo:
        listener = undo.enter_context(socket.socket(family, kind, protocol))
        try:
            listener.bind(address)
        except OSError:
            listener.bind(("", 0))
        listener.listen(count)
        undo.pop_all()
    return listener


def _accept(
    listener: socket.socket, token: str, count: int, silence_s: float, deadline_s: float
) -> dict[socket.socket, Peer]:
    peers: dict[socket.socket, Peer] = {}
    end = time.monotonic() + deadline_s
    with _closed_on_failure(peers), selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while len(peers) < count - 1:
            readable = selector.select(max(0.0, end - time.monotonic()))
            if not readable:
                missing = sorted(set(range(1, count)) - {peer.rank for peer in peers.values()})
                ranks = ", ".join(map(str, missing))
                raise RanksMissingError(f"waited {deadline_s:g} s for ranks {ranks} to connect to rank 0")
            for key, _ in readable:
                if key.data is not None:
                    raise RanksMissingError(f"{key.data} has ended before all ranks were there")
                connection, _ = listener.accept()
                if (peer := _hello(connection, token)) is None:
                    connection.close()
                    continue
                probe_peer(connection, silence_s)
                peers[connection] = peer
                selector.register(connection, selectors.EVENT_READ, peer)
    return peers


def _hello(connection: socket.socket, token: str) -> Peer | None:
    """Return who has connected; None for one that is no rank of this run."""
    connection.settimeout(_HELLO_S)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        said = json.loads(connection.makefile("rb").readline(_HELLO_BYTES))
        if secrets.compare_digest(said["token"], token):
            connection.settimeout(None)
            return Peer(int(said["rank"]), str(said["host"]))
    return None


def _connect(leader: dict[str, str], rank: int, silence_s: float, deadline_s: float) -> dict[socket.socket, Peer]:
    peers: dict[socket.socket, Peer] = {}
    with _closed_on_failure(peers):
        connection = socket.create_connection(split_address(leader["address"]), timeout=deadline_s)
        peers[connection] = Peer(0, leader["host"])
        probe_peer(connection, silence_s)
        hello = {"token": leader["token"], "rank": rank, "host": host_name()}
        connection.sendall(json.dumps(hello).encode() + b"\n")
        try:
            there = connection.recv(1)
        except TimeoutError:
            raise RanksMissingError(f"waited {deadline_s:g} s for all ranks to connect to rank 0") from None
        if there != _ALL_THERE:
            raise RanksMissingError(f"{peers[connection]} has ended before all ranks were there")
        connection.settimeout(None)
    return peers


@contextlib.contextmanager
def _closed_on_failure(connections: dict[socket.socket, Peer]) -> Iterator[None]:
    with contextlib.ExitStack() as undo:
        undo.callback(_close, connections)
        yield
        undo.pop_all()


def _close(connections: Iterable[socket.socket]) -> None:
    for each in connections:
        each.close()
