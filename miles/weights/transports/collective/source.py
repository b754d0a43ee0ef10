"""The trainer's side of a broadcast: one rank's buckets, kept for as long as an engine may ask, and who gets them.

Engines join by gRPC; those that ask for the same version within a moment are served by one broadcast. The process group
of the last broadcast serves the next one too when the same engines ask again; otherwise it is made anew. An engine that
is lost, or that keeps the others waiting, ends the broadcast for all; the others ask again and get another group.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import queue
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence

import grpc
import torch

from miles.rpc.gen import policy_pb2, weightsource_pb2, weightsource_pb2_grpc
from miles.rpc.server import KEEPALIVE_OPTIONS
from miles.rpc.tls import TlsFiles
from miles.weights import flat as flats
from miles.weights.transports.collective.group import BroadcastFailed, Group, Timing, Watch, open_store

logger = logging.getLogger(__name__)

_MOST_MEMBERS = 1024


class WeightSource(weightsource_pb2_grpc.WeightSourceServiceServicer):
    """Serves one rank's buckets from threads of its own; nothing here waits for training, nor training for it."""

    def __init__(self, host: str, device: torch.device, timing: Timing | None = None) -> None:
        """`host` is where engines reach this process, without brackets; `device` is a GPU for NCCL, else the CPU."""
        self.backend = "gloo" if device.type == "cpu" else "nccl"
        self._host = host
        self._device = device
        self._timing = timing or Timing()
        self._staged: dict[int, list[_Bucket]] = {}
        self._spare: dict[int, list[torch.Tensor]] = {}
        self._waiting: list[_Member] = []
        self._changed = threading.Condition()
        self._closed = False
        self._serving = 0
        """Publication being broadcast; 0 for none."""
        self._group: Group | None = None
        self._tickets: dict[tuple[str, int], weightsource_pb2.GroupTicket] = {}
        """Of the group, by member and its number of ranks."""
        self._served: dict[int, set[str]] = {}
        """Who has got each of the live publications, to know whom to wait for at the next one."""
        self.broadcasts = 0
        """Ended well, a count."""
        self._server, self.address = self._listen()
        threading.Thread(target=self._run, name="weight broadcasts", daemon=True).start()

    def buffer(self, nbytes: int) -> torch.Tensor:
        """Host memory for a bucket, uint8 (nbytes,), perhaps of a version that is gone."""
        with self._changed:
            if spare := self._spare.get(nbytes):
                return spare.pop()
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")

    def stage(
        self, publication_id: int, descriptors: Sequence[policy_pb2.TensorDescriptor], flat: torch.Tensor
    ) -> None:
        """Keep a bucket of a version, in host memory, for engines to ask for."""
        with self._changed:
            self._staged.setdefault(publication_id, []).append(_Bucket(list(descriptors), flat))

    def trim(self, live: Collection[int]) -> None:
        """Forget the versions that are not live; their memory is used again."""
        with self._changed:
            self._spare.clear()
            last = max(self._served, default=0)
            for publication_id in set(self._served) - set(live) - {last}:
                del self._served[publication_id]
            for publication_id in set(self._staged) - set(live):
                gone = self._staged.pop(publication_id)
                for bucket in gone if publication_id != self._serving else []:
                    self._spare.setdefault(bucket.flat.numel(), []).append(bucket.flat)

    def forget(self, publication_id: int) -> None:
        """Forget one version."""
        with self._changed:
            self._staged.pop(publication_id, None)

    def staged_bytes(self) -> int:
        """Bytes kept for engines to ask for."""
        with self._changed:
            return sum(bucket.flat.numel() for buckets in self._staged.values() for bucket in buckets)

    def close(self) -> None:
        """Serve nothing more; broadcasts under way fail."""
        with self._changed:
            self._closed = True
            self._staged.clear()
            self._spare.clear()
            self._changed.notify_all()
        self._server.stop(grace=None)

    def Join(
        self, request_iterator: Iterator[weightsource_pb2.JoinRequest], context: grpc.ServicerContext
    ) -> Iterator[weightsource_pb2.JoinResponse]:
        """See weightsource.proto."""
        first = next(request_iterator, None)
        if first is None or first.WhichOneof("kind") != "hello" or not first.hello.member or not first.hello.ranks:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a hello with member and ranks must come first")
            return
        with self._changed:
            held = first.hello.publication_id in self._staged
        if not held:
            text = f"publication {first.hello.publication_id} is not, or no longer, held here"
            context.abort(grpc.StatusCode.NOT_FOUND, text)
        member = _Member(first.hello)
        if not context.add_callback(member.leave):
            return
        threading.Thread(target=member.listen, args=(request_iterator,), daemon=True).start()
        with self._changed:
            self._waiting.append(member)
            self._changed.notify_all()
        while (message := member.outbox.get()) is not None:
            yield message
            if message.WhichOneof("kind") in ("done", "aborted"):
                return

    def _listen(self) -> tuple[grpc.Server, str]:
        workers = concurrent.futures.ThreadPoolExecutor(_MOST_MEMBERS, thread_name_prefix="weight-source")
        server = grpc.server(workers, options=[*KEEPALIVE_OPTIONS, ("grpc.so_reuseport", 0)])
        weightsource_pb2_grpc.add_WeightSourceServiceServicer_to_server(self, server)
        host = f"[{self._host}]" if ":" in self._host else self._host
        address = f"{host}:0"
        if (tls := TlsFiles.from_environment()) is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, tls.server_credentials())
        server.start()
        return server, f"{host}:{port}"

    def _run(self) -> None:
        """Broadcast to whoever asks, one group of engines at a time."""
        while members := self._gather():
            self._serve(members)
            with self._changed:
                self._serving = 0
        self._leave_group()

    def _gather(self) -> list[_Member]:
        """Wait for engines that want the same bytes in the same form; empty when the source is closed."""
        with self._changed:
            while not self._closed:
                self._waiting = [member for member in self._waiting if not member.gone]
                if not self._waiting:
                    self._changed.wait()
                elif (left_s := self._still_waits_s()) > 0:
                    self._changed.wait(left_s)
                else:
                    wanted = self._waiting[0].wants
                    chosen = {member.hello.member: member for member in self._waiting if member.wants == wanted}
                    self._waiting = [member for member in self._waiting if member.wants != wanted]
                    self._serving = wanted[0]
                    return list(chosen.values())
            return []

    def _still_waits_s(self) -> float:
        """How much longer to wait for more engines."""
        first = self._waiting[0]
        here = {member.hello.member for member in self._waiting if member.wants == first.wants}
        publication_id = first.hello.publication_id
        before = max((other for other in self._served if other < publication_id), default=0)
        expected = set(first.hello.companions) or (
            self._served.get(before, set()) - self._served.get(publication_id, set())
        )
        if expected and expected <= here:
            return 0.0
        wait_s = self._timing.linger_s if expected else self._timing.gather_s
        return first.arrived_s + wait_s - time.monotonic()

    def _serve(self, members: Sequence[_Member]) -> None:
        """One broadcast, from tickets to the end."""
        publication_id, packed = members[0].wants
        watch = Watch(time.monotonic() + self._timing.deadline_s)
        for member in members:
            member.watched_by(watch)
        began = time.monotonic()
        try:
            with self._changed:
                buckets = list(self._staged.get(publication_id, ()))
            if not buckets:
                raise BroadcastFailed(f"publication {publication_id} is no longer held here")
            group = self._group_of(members, watch)
            _tell(members, weightsource_pb2.JoinResponse(begins=weightsource_pb2.BroadcastBegins()))
            self._broadcast(group, buckets, packed, watch)
            _until_all(members, "received", watch, self._timing.patience_s)
        except (BroadcastFailed, TimeoutError) as error:
            reason = str(error)  # a record of the error itself would keep the group, and the others' connections
            logger.warning("broadcast of publication %d to %s: %s", publication_id, _names(members), reason)
            self._leave_group()
            aborted = weightsource_pb2.BroadcastAborted(reason=reason)
            _tell(members, weightsource_pb2.JoinResponse(aborted=aborted))
            with self._changed:
                for served in self._served.values():
                    served.difference_update(member.hello.member for member in members if member.gone)
        else:
            with self._changed:
                self.broadcasts += 1
                self._served.setdefault(publication_id, set()).update(member.hello.member for member in members)
            size, elapsed_s = sum(bucket.flat.numel() for bucket in buckets), time.monotonic() - began
            logger.info("broadcast %d bytes to %s in %.3f s", size, _names(members), elapsed_s)
            _tell(members, weightsource_pb2.JoinResponse(done=weightsource_pb2.BroadcastDone()))

    def _group_of(self, members: Sequence[_Member], watch: Watch) -> Group:
        """The group of exactly these members: the last one, or a new one."""
        if self._group is None or {member.seat for member in members} != set(self._tickets):
            self._leave_group()
            store = open_store(self._host, self._timing.patience_s)
            ticket = weightsource_pb2.GroupTicket(
                group_name=f"weights-{uuid.uuid4().hex}",
                master_address=self._host,
                master_port=store.port,
                rank_offset=1,
                world_size=1 + sum(member.hello.ranks for member in members),
                backend=self.backend,
                members=[member.hello.member for member in members],
            )
            for member in members:
                mine = self._tickets[member.seat] = weightsource_pb2.GroupTicket()
                mine.CopyFrom(ticket)
                ticket.rank_offset += member.hello.ranks
            _tell_each((member, self._tickets[member.seat]) for member in members)
            self._group = Group(ticket, 0, self._device, watch, self._timing.patience_s, store)
        else:
            _tell_each((member, self._tickets[member.seat]) for member in members)
        _until_all(members, "ready", watch, self._timing.patience_s)
        return self._group

    def _broadcast(self, group: Group, buckets: Sequence[_Bucket], packed: bool, watch: Watch) -> None:
        if self._device.type == "cpu":
            for bucket in buckets:
                work = group.broadcast(bucket.bytes(packed), watch)
                group.wait(work, watch, f"a bucket of {bucket.flat.numel()} bytes to be sent")
            return
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream(self._device)):  # type: ignore[no-untyped-call]
            # Two buckets on the device: while one is broadcast, the next is copied.
            under_way: list[tuple[torch.Tensor, torch.distributed.Work]] = []
            for bucket in buckets:
                if len(under_way) == 2:
                    group.wait(under_way.pop(0)[1], watch, "a bucket to be sent")
                on_device = bucket.bytes(packed).to(self._device, non_blocking=True)
                under_way.append((on_device, group.broadcast(on_device, watch)))
            for _, work in under_way:
                group.wait(work, watch, "a bucket to be sent")

    def _leave_group(self) -> None:
        group, self._group = self._group, None
        self._tickets = {}
        if group is not None:
            group.close()


@dataclasses.dataclass(frozen=True, slots=True)
class _Bucket:
    descriptors: list[policy_pb2.TensorDescriptor]
    flat: torch.Tensor

    def bytes(self, packed: bool) -> torch.Tensor:
        """What is sent, uint8 (n,)."""
        return flats.packed(self.flat, self.descriptors) if packed else self.flat


class _Member:
    """One engine's part in one broadcast."""

    def __init__(self, hello: weightsource_pb2.JoinHello) -> None:
        self.hello = hello
        self.wants = (hello.publication_id, hello.packed)
        self.seat = (hello.member, hello.ranks)
        self.outbox: queue.SimpleQueue[weightsource_pb2.JoinResponse | None] = queue.SimpleQueue()
        self.said: set[str] = set()
        self.gone = False
        self.arrived_s = time.monotonic()
        self._watch: Watch | None = None

    def watched_by(self, watch: Watch) -> None:
        """Have the watch stopped when the engine leaves, or has left."""
        self._watch = watch
        if self.gone:
            self.leave()

    def listen(self, requests: Iterable[weightsource_pb2.JoinRequest]) -> None:
        """Hear what the engine says, until it leaves."""
        try:
            for request in requests:
                self.said.add(request.WhichOneof("kind") or "")
        except grpc.RpcError:
            self.leave()

    def leave(self) -> None:
        """The engine's stream has ended."""
        self.gone = True
        if self._watch is not None:
            self._watch.stop(f"engine {self.hello.member} is gone")
        self.outbox.put(None)


def _tell(members: Iterable[_Member], message: weightsource_pb2.JoinResponse) -> None:
    for member in members:
        member.outbox.put(message)


def _tell_each(tickets: Iterable[tuple[_Member, weightsource_pb2.GroupTicket]]) -> None:
    for member, ticket in tickets:
        member.outbox.put(weightsource_pb2.JoinResponse(ticket=ticket))


def _until_all(members: Collection[_Member], said: str, watch: Watch, patience_s: float) -> None:
    """Wait until every member has said it."""

    def missing() -> str:
        return _names(member for member in members if said not in member.said)

    try:
        watch.until(lambda: all(said in member.said for member in members), f"the word {said!r}", patience_s)
    except TimeoutError as error:
        raise TimeoutError(f"{error} from {missing()}") from None


def _names(members: Iterable[_Member]) -> str:
    return ", ".join(member.hello.member for member in members)
