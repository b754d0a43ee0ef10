"""Engines that take part in a broadcast, as the source sees them."""

from __future__ import annotations

import queue
import time
from collections.abc import Collection, Iterable

import grpc

from miles.rpc.gen import weightsource_pb2
from miles.weights.transports.collective.group import Watch


class JoinedEngine:
    """One engine's part in one broadcast."""

    def __init__(self, hello: weightsource_pb2.JoinHello) -> None:
        self.hello = hello
        self.wants = (hello.publication_id, hello.packed)
        """Engines that want the same can be served by one broadcast."""
        self.seat = (hello.member, hello.ranks)
        """Its place in a process group."""
        self.outbox: queue.SimpleQueue[weightsource_pb2.JoinResponse | None] = queue.SimpleQueue()
        """Messages to the engine; None ends the stream."""
        self.received: set[str] = set()
        """Kinds of the messages received from it."""
        self.gone = False
        self.arrived_s = time.monotonic()
        self._watch: Watch | None = None

    def watched_by(self, watch: Watch) -> None:
        """Stop the watch when the engine leaves, or has left."""
        self._watch = watch
        if self.gone:
            self.leave()

    def listen(self, requests: Iterable[weightsource_pb2.JoinRequest]) -> None:
        """Receive the engine's messages until it leaves."""
        try:
            for request in requests:
                self.received.add(request.WhichOneof("kind") or "")
        except grpc.RpcError:
            self.leave()

    def leave(self) -> None:
        """The engine's stream has ended."""
        self.gone = True
        if self._watch is not None:
            self._watch.stop(f"engine {self.hello.member} is gone")
        self.outbox.put(None)


def send_all(engines: Iterable[JoinedEngine], message: weightsource_pb2.JoinResponse) -> None:
    """Send a message to every engine."""
    for engine in engines:
        engine.outbox.put(message)


def wait_for_all(engines: Collection[JoinedEngine], kind: str, watch: Watch, patience_s: float) -> None:
    """Wait until every engine has sent a message of this kind."""

    def missing() -> list[JoinedEngine]:
        return [engine for engine in engines if kind not in engine.received]

    watch.until(lambda: not missing(), lambda: f"{kind!r} from {names(missing())}", patience_s)


def names(engines: Iterable[JoinedEngine]) -> str:
    """The engines, for a message."""
    return ", ".join(engine.hello.member for engine in engines)
