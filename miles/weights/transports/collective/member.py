"""The engine's side of a broadcast: ask a source, join its process group, receive the bytes."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import grpc
import torch

from miles.rpc import connect_blocking
from miles.rpc.gen import weightsource_pb2, weightsource_pb2_grpc
from miles.weights.transports.collective.group import BroadcastFailed, Group, Timing, Watch

logger = logging.getLogger(__name__)

_ASK_AGAIN_S = 0.05


class Receiver(Protocol):
    """Receives the bytes of a broadcast."""

    def join(self, source: str, ticket: weightsource_pb2.GroupTicket, watch: Watch) -> None:
        """Join the group of a ticket from that source; leave the source's former group if it is another."""

    def take(self, source: str, watch: Watch) -> None:
        """Receive every bucket of the source, in order."""

    def leave(self, source: str) -> None:
        """Leave the group of that source, which has failed."""


def receive_from(
    source: str,
    hello: weightsource_pb2.JoinHello,
    receiver: Receiver,
    deadline_s: float,
    timing: Timing,
) -> list[str]:
    """Receive one source's buckets of a version; ask again until `deadline_s` when others make a broadcast fail.

    `deadline_s` is on the monotonic clock; of `timing`, connect_s and patience_s are used. Raises ConnectionError
    when the source is gone or does not have the version, and TimeoutError past the deadline. Returns the names of all
    members that took part, for the hello to the next source.
    """
    while True:
        try:
            with connect_blocking(source) as channel:
                return _take_part(channel, source, hello, receiver, Watch(deadline_s), timing)
        except (BroadcastFailed, TimeoutError) as error:
            receiver.leave(source)
            del hello.companions[:]  # one of them may be the reason
            if time.monotonic() >= deadline_s:
                raise TimeoutError(f"no broadcast from {source} succeeded in time; the last one: {error}") from error
            reason = str(error)  # logging the error itself would keep the group alive by its traceback
            logger.info("broadcast from %s: %s; asking again", source, reason)
            time.sleep(_ASK_AGAIN_S)
        except BaseException:
            receiver.leave(source)
            raise


def _take_part(
    channel: grpc.Channel,
    source: str,
    hello: weightsource_pb2.JoinHello,
    receiver: Receiver,
    watch: Watch,
    timing: Timing,
) -> list[str]:
    with _JoinStream(channel, source, watch, timing.connect_s) as stream:
        stream.send(weightsource_pb2.JoinRequest(hello=hello))
        ticket = stream.receive("ticket", watch.deadline_s).ticket
        receiver.join(source, ticket, watch)
        stream.send(weightsource_pb2.JoinRequest(ready=weightsource_pb2.JoinReady()))
        stream.receive("begins", time.monotonic() + 2 * timing.patience_s)
        receiver.take(source, watch)
        stream.send(weightsource_pb2.JoinRequest(received=weightsource_pb2.JoinReceived()))
        stream.receive("done", time.monotonic() + 2 * timing.patience_s)
        return list(ticket.members)


class _JoinStream:
    """A stream to the source. A failure stops the watch at once; other messages wait in a queue."""

    def __init__(self, channel: grpc.Channel, source: str, watch: Watch, connect_s: float) -> None:
        self._source = source
        self._watch = watch
        self._outbox: queue.SimpleQueue[weightsource_pb2.JoinRequest | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[weightsource_pb2.JoinResponse] = queue.SimpleQueue()
        self._fault: Exception | None = None
        try:
            grpc.channel_ready_future(channel).result(timeout=min(connect_s, watch.deadline_s - time.monotonic()))
        except grpc.FutureTimeoutError:
            raise ConnectionError(f"the trainer that has the weights, at {source}, cannot be reached") from None
        stub: Any = weightsource_pb2_grpc.WeightSourceServiceStub(channel)
        self._call = stub.Join(self._requests())
        self._listener = threading.Thread(target=self._listen, name=f"join {source}", daemon=True)
        self._listener.start()

    def __enter__(self) -> _JoinStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._outbox.put(None)
        self._call.cancel()
        self._listener.join()

    def send(self, request: weightsource_pb2.JoinRequest) -> None:
        """Send without waiting."""
        self._outbox.put(request)

    def receive(self, kind: str, deadline_s: float) -> weightsource_pb2.JoinResponse:
        """Wait for the next message, which must be of this kind."""
        received: list[weightsource_pb2.JoinResponse] = []

        def arrived() -> bool:
            with contextlib.suppress(queue.Empty):
                received.append(self._answers.get_nowait())
            return bool(received)

        try:
            self._watch.until(arrived, f"{kind!r} from {self._source}", deadline_s - time.monotonic())
        except BroadcastFailed:
            if self._fault is not None:
                raise self._fault from None
            raise
        if received[0].WhichOneof("kind") != kind:
            raise BroadcastFailed(f"{self._source} sent {received[0].WhichOneof('kind')!r} instead of {kind!r}")
        return received[0]

    def _requests(self) -> Iterator[weightsource_pb2.JoinRequest]:
        while (request := self._outbox.get()) is not None:
            yield request

    def _listen(self) -> None:
        try:
            for answer in self._call:
                if answer.WhichOneof("kind") == "aborted":
                    self._watch.stop(answer.aborted.reason)
                self._answers.put(answer)
        except grpc.RpcError as error:
            code: Any = error
            if code.code() is grpc.StatusCode.CANCELLED:
                return
            self._fault = ConnectionError(
                f"the trainer's source at {self._source}: {code.code().name}: {code.details()}"
            )
            self._watch.stop(str(self._fault))


class TensorReceiver:
    """Receives broadcasts into tensors of this process; implements Receiver. Keeps a group per source."""

    def __init__(self, device: torch.device, patience_s: float) -> None:
        """`device` is a GPU for NCCL and the CPU for gloo."""
        self.member = f"engine-{uuid.uuid4().hex[:12]}"
        """Name of this receiver for sources."""
        self._device = device
        self._patience_s = patience_s
        self._groups: dict[str, Group] = {}
        self._targets: Mapping[str, Sequence[torch.Tensor]] = {}

    def set_targets(self, tensors: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Set the tensors for the buckets of each source, uint8 (n,) each, in the source's order."""
        self._targets = tensors

    def join(self, source: str, ticket: weightsource_pb2.GroupTicket, watch: Watch) -> None:
        """See Receiver."""
        if source in self._groups and self._groups[source].name == ticket.group_name:
            return
        self.leave(source)
        self._groups[source] = Group(ticket, ticket.rank_offset, self._device, watch, self._patience_s)

    def take(self, source: str, watch: Watch) -> None:
        """See Receiver."""
        group = self._groups[source]
        works = []
        for flat in self._targets[source]:
            work = group.broadcast(flat, watch)
            if self._device.type == "cpu":
                group.wait(work, watch, f"a bucket of {flat.numel()} bytes from {source}")
            else:
                works.append((flat, work))  # they queue up on the device
        for flat, work in works:
            group.wait(work, watch, f"a bucket of {flat.numel()} bytes from {source}")

    def leave(self, source: str) -> None:
        """See Receiver."""
        group = self._groups.pop(source, None)
        if group is not None:
            group.close()

    def leave_all_but(self, sources: Collection[str]) -> None:
        """Leave the groups of sources that are no longer used."""
        for source in set(self._groups) - set(sources):
            self.leave(source)
