"""The trainer's side of broadcasts: serves one rank's buckets to the engines that ask for them.

Engines join by gRPC; those that ask for the same version within a moment are served by one broadcast. The process group
of the last broadcast is reused when the same engines ask again; otherwise a new one is made. An engine that is lost, or
that keeps the others waiting, ends the broadcast for all; the others ask again and get a new group.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
import uuid
from collections.abc import Collection, Iterator, Sequence

import grpc
import torch

from miles.rpc.gen import weightsource_pb2, weightsource_pb2_grpc
from miles.rpc.server import KEEPALIVE_OPTIONS
from miles.rpc.tls import TlsFiles
from miles.weights.transports.collective.group import BroadcastFailed, Group, Timing, Watch, open_store
from miles.weights.transports.collective.joined import JoinedEngine, names, send_all, wait_for_all
from miles.weights.transports.collective.staging import StagedBucket, StagedBuckets

logger = logging.getLogger(__name__)

_MOST_MEMBERS = 1024


class WeightSource(weightsource_pb2_grpc.WeightSourceServiceServicer):
    """Serves one rank's buckets from its own threads: it never waits for training, nor training for it."""

    def __init__(self, host: str, device: torch.device, timing: Timing | None = None) -> None:
        """`host` is this machine's address for engines, without brackets; `device` is a GPU for NCCL, else the CPU."""
        self.backend = "gloo" if device.type == "cpu" else "nccl"
        self._host = host
        self._device = device
        self._timing = timing or Timing()
        self.staged = StagedBuckets(pin_memory=device.type == "cuda")
        self._waiting: list[JoinedEngine] = []
        self._changed = threading.Condition()
        self._closed = False
        self._group: Group | None = None
        self._tickets: dict[tuple[str, int], weightsource_pb2.GroupTicket] = {}
        """Of the group, by member and its number of ranks."""
        self._served: dict[int, set[str]] = {}
        """Members that received each of the live publications: those to wait for at the next one."""
        self.broadcasts = 0
        """Number of broadcasts that succeeded."""
        self._server, self.address = self._listen()
        threading.Thread(target=self._run, name="weight broadcasts", daemon=True).start()

    def trim(self, live: Collection[int]) -> None:
        """Forget the versions that are not live, and reuse their memory."""
        with self._changed:
            last = max(self._served, default=0)
            for publication_id in set(self._served) - set(live) - {last}:
                del self._served[publication_id]
        self.staged.trim(live)

    def close(self) -> None:
        """Serve nothing more; broadcasts under way fail."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.staged.clear()
        self._server.stop(grace=None)

    def Join(
        self, request_iterator: Iterator[weightsource_pb2.JoinRequest], context: grpc.ServicerContext
    ) -> Iterator[weightsource_pb2.JoinResponse]:
        """See weightsource.proto."""
        first = next(request_iterator, None)
        if first is None or first.WhichOneof("kind") != "hello" or not first.hello.member or not first.hello.ranks:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a hello with member and ranks must come first")
            return
        if not self.staged.of(first.hello.publication_id):
            text = f"publication {first.hello.publication_id} is not, or no longer, held here"
            context.abort(grpc.StatusCode.NOT_FOUND, text)
        member = JoinedEngine(first.hello)
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
        """Broadcast to the engines that ask, one group at a time."""
        while members := self._gather():
            self._serve(members)
            self.staged.use(0)
        self._leave_group()

    def _gather(self) -> list[JoinedEngine]:
        """Wait for engines that want the same version in the same form; empty when the source is closed."""
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
                    self.staged.use(wanted[0])
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

    def _serve(self, members: Sequence[JoinedEngine]) -> None:
        """Serve one broadcast, from tickets to the end."""
        publication_id, packed = members[0].wants
        watch = Watch(time.monotonic() + self._timing.deadline_s)
        for member in members:
            member.watched_by(watch)
        began = time.monotonic()
        try:
            buckets = self.staged.of(publication_id)
            if not buckets:
                raise BroadcastFailed(f"publication {publication_id} is no longer held here")
            group = self._group_of(members, watch)
            send_all(members, weightsource_pb2.JoinResponse(begins=weightsource_pb2.BroadcastBegins()))
            self._broadcast(group, buckets, packed, watch)
            wait_for_all(members, "received", watch, self._timing.patience_s)
        except (BroadcastFailed, TimeoutError) as error:
            reason = str(error)  # logging the error itself would keep the group, and so the others' connections, alive
            logger.warning("broadcast of publication %d to %s: %s", publication_id, names(members), reason)
            self._leave_group()
            aborted = weightsource_pb2.BroadcastAborted(reason=reason)
            send_all(members, weightsource_pb2.JoinResponse(aborted=aborted))
            with self._changed:
                for served in self._served.values():
                    served.difference_update(member.hello.member for member in members if member.gone)
        else:
            with self._changed:
                self.broadcasts += 1
                self._served.setdefault(publication_id, set()).update(member.hello.member for member in members)
            size, elapsed_s = sum(bucket.flat.numel() for bucket in buckets), time.monotonic() - began
            logger.info("broadcast %d bytes to %s in %.3f s", size, names(members), elapsed_s)
            send_all(members, weightsource_pb2.JoinResponse(done=weightsource_pb2.BroadcastDone()))

    def _group_of(self, members: Sequence[JoinedEngine], watch: Watch) -> Group:
        """The group of exactly these members: the last one if it fits, else a new one."""
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
            self._send_tickets(members)
            self._group = Group(ticket, 0, self._device, watch, self._timing.patience_s, store)
        else:
            self._send_tickets(members)
        wait_for_all(members, "ready", watch, self._timing.patience_s)
        return self._group

    def _send_tickets(self, members: Sequence[JoinedEngine]) -> None:
        for member in members:
            member.outbox.put(weightsource_pb2.JoinResponse(ticket=self._tickets[member.seat]))

    def _broadcast(self, group: Group, buckets: Sequence[StagedBucket], packed: bool, watch: Watch) -> None:
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
