"""One stream of weights at run time: feeds events to the publication state machine and carries out its actions."""

from __future__ import annotations

import asyncio
import itertools
import logging
import pathlib
import time
import uuid
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.services.weightsync import messages, snapshot, transport_choice
from miles.services.weightsync.actions import Action, Disconnect, Ended, EngineChanged, Free, Outcome, Send
from miles.services.weightsync.chunk_table import ChunkTable
from miles.services.weightsync.engine import Engine, Order, OrderKind
from miles.services.weightsync.folders import FolderStore
from miles.services.weightsync.holdings import Holdings
from miles.services.weightsync.links import LOCAL, Links
from miles.services.weightsync.publication import Publication
from miles.services.weightsync.reach import reached_by_none
from miles.services.weightsync.segments import SegmentStore
from miles.services.weightsync.store import StateStore
from miles.services.weightsync.timing import Now, PublicationLimits
from miles.services.weightsync.version import Refused
from miles.weights import manifest as manifests

if TYPE_CHECKING:
    from miles.rpc.gen import weightsource_pb2
    from miles.services.weightsync.transport_choice import Placement

logger = logging.getLogger(__name__)

Event = weightsync_pb2.EngineStatus | Outcome
"""What watchers of an activation receive: engines' stages, then the outcome."""

_sessions = itertools.count(1)


def stream_key(job_id: str, stream: policy_pb2.WeightStream.ValueType) -> str:
    """Name of a stream in files and state."""
    return f"{job_id}/{manifests.stream_name(stream)}"


class StreamRuntime:
    """The publications of one stream of one job. All methods run on the event loop."""

    def __init__(
        self,
        job_id: str,
        stream: policy_pb2.WeightStream.ValueType,
        store: StateStore,
        segments: SegmentStore,
        folders: FolderStore,
        limits: PublicationLimits,
    ) -> None:
        self.job_id = job_id
        self.stream = stream
        self.key = stream_key(job_id, stream)
        self.machine = Publication(limits)
        self._store = store
        self._has_folders = folders.root is not None
        self.holdings = Holdings(self.key, store, segments, folders)
        self._links = Links()
        self._placed: Placement | None = None
        """How the last version is sent; None before the first."""
        self._subscriptions: dict[int, asyncio.Queue[weightsync_pb2.SubscribeResponse | None]] = {}
        self._watchers: dict[asyncio.Queue[Event], str] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._allocating = asyncio.Lock()
        self.activations_ended = 0

    def restore(self, saved: dict[str, Any]) -> tuple[set[pathlib.Path], set[pathlib.Path]]:
        """Restore the state of an earlier process; return the files and folders that it knows.

        Versions whose bytes are gone are discarded.
        """
        self.machine = snapshot.load(saved, _now(), self.machine.limits)
        known = self.holdings.restore(self.machine.versions.keys())
        for publication_id, version in list(self.machine.versions.items()):
            gone = publication_id not in self.holdings
            if gone or (version.checksum and self.holdings[publication_id].manifest is None):
                logger.warning("%s: the bytes of version %d are gone", self.key, version.number)
                self.holdings.free(publication_id, reusable=False)
                self._apply(self.machine.discard(publication_id, _now()))
        return known

    # -- the trainer's calls ------------------------------------------------------------------------------------------

    async def allocate(self, request: weightsync_pb2.AllocateRequest) -> weightsync_pb2.AllocateResponse:
        """Reserve room for a version; raises OutOfMemory, NoTransport or Refused."""
        async with self._allocating:
            trainer = frozenset(request.usable) or LOCAL
            usable = self._links.usable_for(self._attached(), request.opened, request.nbytes)
            placement = transport_choice.place(request.transport, trainer, usable, folders=self._has_folders)
            if placement != self._placed:
                logger.info("%s: weights go by %s", self.key, transport_choice.names(placement.kinds))
                self._placed = placement
            version, actions = self.machine.allocate(request.version.version, request.nbytes, _now())
            self._apply(actions)
            publication_id = version.publication_id
            try:
                holding = await self.holdings.allocate(
                    publication_id, request, placement, lambda: publication_id in self.machine.versions
                )
            except OSError:
                self._apply(self.machine.discard(publication_id, _now()))
                raise
            return weightsync_pb2.AllocateResponse(
                handle=holding.handles[0],
                more=holding.handles[1:],
                live_publication_ids=sorted(self.machine.versions),
            )

    def prepare(self, request: weightsync_pb2.PrepareRequest) -> None:
        """Declare a version complete: every byte is where the handles say; raises Refused or UnknownVersion."""
        manifest = request.manifest
        publication_id = self.holdings.find(request.handle, manifest.version.version)
        version = self.machine.versions[publication_id]
        self.holdings.check(publication_id, request)
        placement = self.holdings[publication_id].placement
        beyond = [name for name in self._attached() if not self._links.reaches(name, placement, request.handle)]
        actions = self.machine.prepare(publication_id, manifest.checksum, _now(), beyond)
        if version.written_bytes == 0:
            version.written_bytes, version.stage_s = request.written_bytes, dict(request.stage_s)
        self.holdings.complete(publication_id, request)
        self._apply(actions)

    def uploading(self, publication_id: int) -> ChunkTable:
        """The chunks of a publication that the trainer may still upload to; raises Refused or UnknownVersion."""
        if publication_id in self.holdings and self.holdings[publication_id].manifest is not None:
            raise Refused("it is complete already")
        return self.holdings.chunk_table(publication_id)

    def downloading(self, publication_id: int) -> ChunkTable:
        """The chunks of a complete publication; raises Refused or UnknownVersion."""
        if publication_id in self.holdings and self.holdings[publication_id].manifest is None:
            raise Refused("its bytes are not complete")
        return self.holdings.chunk_table(publication_id)

    # -- the controller's calls ---------------------------------------------------------------------------------------

    def activate(
        self,
        number: int,
        operation_id: str,
        deadline_s: float,
        min_engines: int,
        check_equal: bool,
        wait_for: Collection[str] = (),
    ) -> asyncio.Queue[Event]:
        """Begin, join or look up an activation; the queue gets engines' stages and ends with an Outcome."""
        actions = self.machine.activate(number, operation_id, deadline_s, min_engines, check_equal, _now(), wait_for)
        events: asyncio.Queue[Event] = asyncio.Queue()
        self._watchers[events] = operation_id
        for engine in self.machine.engines.values():
            events.put_nowait(self.engine_status(engine))
        self._apply(actions)
        outcome = self.machine.outcomes.get(operation_id)
        if outcome is not None and events in self._watchers:
            self._watchers.pop(events)
            events.put_nowait(outcome)
        return events

    def check(self, deadline_s: float) -> tuple[int, asyncio.Queue[Event]]:
        """Have engines compare what they serve with the active version; return its number, and events as in `activate`.

        Refused while an activation is under way, which a check must not end.
        """
        if self.machine.activation is not None:
            raise Refused("a version is being activated; ask again when it is")
        active = None if self.machine.active is None else self.machine.versions[self.machine.active]
        if active is None or self.machine.find(active.number) is not active:
            raise Refused("no version is active, or its number has been published again")
        return active.number, self.activate(active.number, f"check-{uuid.uuid4().hex}", deadline_s, 0, True)

    def unwatch(self, events: asyncio.Queue[Event]) -> None:
        """Stop sending events to a queue; the activation goes on."""
        self._watchers.pop(events, None)

    def release(self) -> int:
        """Free everything the stream has; return the bytes freed."""
        freed = self.holdings.nbytes
        self._apply(self.machine.release(_now()))
        freed += self.holdings.free_spare()
        self._store.delete_stream(self.key)
        return freed

    # -- the engines' calls -------------------------------------------------------------------------------------------

    def subscribe(
        self, hello: weightsync_pb2.EngineHello
    ) -> tuple[int, asyncio.Queue[weightsync_pb2.SubscribeResponse | None]]:
        """Attach an engine; its orders come through the queue, and None ends the subscription."""
        session = next(_sessions)
        orders: asyncio.Queue[weightsync_pb2.SubscribeResponse | None] = asyncio.Queue()
        self._subscriptions[session] = orders
        self._links.attach(hello)
        number = hello.version if hello.HasField("version") else None
        beyond = [p for p in self.machine.versions if not self._reaches(hello.engine_id, p)]
        self._apply(self.machine.connect(hello.engine_id, session, number, hello.manifest_checksum, _now(), beyond))
        return session, orders

    def unsubscribe(self, engine_id: str, session: int) -> None:
        """Detach an engine whose subscription has ended."""
        self._subscriptions.pop(session, None)
        self._apply(self.machine.disconnect(engine_id, session, _now()))

    def report(self, engine_id: str, session: int, report: weightsync_pb2.EngineReport) -> None:
        """Record an engine's answer to an order."""
        done = report.outcome == weightsync_pb2.ORDER_OUTCOME_DONE
        error = None if done else report.error or "it gave no reason"
        refused = report.outcome == weightsync_pb2.ORDER_OUTCOME_REFUSED
        engine = self.machine.engines.get(engine_id)
        if engine is not None and engine.is_prefetching(session, report.order_id) and not (done or refused):
            self._links.failed(engine_id)
        actions = self.machine.report(
            engine_id, session, report.order_id, error, report.elapsed_s, report.pause_s, _now(), refused
        )
        self._apply(actions)

    # -- answers ------------------------------------------------------------------------------------------------------

    def version_statuses(self) -> list[weightsync_pb2.VersionStatus]:
        """Every version whose bytes exist, oldest first."""
        return [
            messages.version_status(
                self._name(version.number),
                version,
                self.holdings.transports(version.publication_id) if version.publication_id in self.holdings else [],
                self._is_lost(version.publication_id),
            )
            for version in self.machine.versions.values()
        ]

    def engine_status(self, engine: Engine) -> weightsync_pb2.EngineStatus:
        """An engine as the wire shows it."""
        transport = self._links.used(engine.engine_id)
        versions, target = self.machine.versions, self.machine.target
        return messages.engine_status(self.job_id, self.stream, engine, versions, transport, target)

    def gpu_memory(self) -> list[weightsource_pb2.GpuMemoryProbe]:
        """What the attached engines share of their GPUs' memory."""
        return self._links.gpu_memory(self._attached())

    def close(self) -> None:
        """End every subscription and stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
        for orders in self._subscriptions.values():
            orders.put_nowait(None)

    # -- actions -------------------------------------------------------------------------------------------------------

    def _apply(self, actions: list[Action]) -> None:
        """Make the new state durable, then act on it."""
        self._links.note_late(self.machine.engines.values())
        self._store.save_stream(self.key, snapshot.save(self.machine))
        for action in actions:
            match action:
                case Send(engine_id=engine_id, session=session, order=order):
                    if session in self._subscriptions:
                        self._subscriptions[session].put_nowait(self._order(engine_id, order))
                case Free(publication_id=publication_id, reusable=reusable):
                    self.holdings.free(publication_id, reusable)
                case EngineChanged(engine_id=engine_id):
                    self._notify_watchers(engine_id)
                case Ended(operation_ids=operation_ids, outcome=outcome):
                    self._end_activation(operation_ids, outcome)
                case Disconnect(session=session):
                    if session in self._subscriptions:
                        self._subscriptions[session].put_nowait(None)
        self._set_timer()

    def _notify_watchers(self, engine_id: str) -> None:
        engine = self.machine.engines.get(engine_id)
        if engine is None:
            return
        status = self.engine_status(engine)
        if engine.quarantined:
            logger.warning("%s: engine %s is quarantined: %s", self.key, engine_id, engine.last_error)
        for events in self._watchers:
            events.put_nowait(status)

    def _end_activation(self, operation_ids: tuple[str, ...], outcome: Outcome) -> None:
        self.activations_ended += 1
        logger.info("%s: activation %s ended: %s", self.key, operation_ids[0], outcome)
        for events, operation_id in list(self._watchers.items()):
            if operation_id in operation_ids:
                del self._watchers[events]
                events.put_nowait(outcome)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        wake_at_s = self.machine.wake_at_s()
        self._timer = None
        if wake_at_s is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, wake_at_s - time.monotonic()), self._tick)

    def _tick(self) -> None:
        self._apply(self.machine.tick(_now()))

    def _order(self, engine_id: str, order: Order) -> weightsync_pb2.SubscribeResponse:
        match order.kind:
            case OrderKind.QUARANTINE:
                return messages.quarantine_order(order)
            case OrderKind.PREFETCH:
                handle = self.holdings.handle_for(order.publication_id, self._links.usable(engine_id))
                self._links.prefetches(engine_id, handle.kind)
                return messages.prefetch_order(order, self._manifest(order.publication_id), handle)
            case OrderKind.CHECK:
                return messages.check_order(order, self._manifest(order.publication_id))
            case OrderKind.SWAP:
                return messages.swap_order(order, self._name(order.number))
            case OrderKind.DISCARD:
                return messages.discard_order(order, self._name(order.number))

    def _is_lost(self, publication_id: int) -> bool:
        """Whether a publication is active where no engine is left that can get it."""
        if publication_id != self.machine.active or self.machine.activation or publication_id not in self.holdings:
            return False
        placement = self.holdings[publication_id].placement
        chosen = not placement.fixed and weightsync_pb2.TRANSPORT_KIND_CUDA_IPC in placement.kinds
        return chosen and reached_by_none(publication_id, self.machine.engines.values(), self._links.has_failed)

    def _attached(self) -> list[str]:
        return [engine.engine_id for engine in self.machine.engines.values() if engine.session is not None]

    def _reaches(self, engine_id: str, publication_id: int) -> bool:
        """Whether an engine may get a publication; `prepare` decides for those that are not complete."""
        if publication_id not in self.holdings or self.holdings[publication_id].manifest is None:
            return True
        holding = self.holdings[publication_id]
        return self._links.reaches(engine_id, holding.placement, holding.handles[0])

    def _manifest(self, publication_id: int) -> policy_pb2.Manifest:
        manifest = self.holdings[publication_id].manifest
        assert manifest is not None, "only complete versions are sent to engines"
        return manifest

    def _name(self, number: int) -> policy_pb2.WeightVersion:
        return policy_pb2.WeightVersion(job_id=self.job_id, stream=self.stream, version=number)


def _now() -> Now:
    return Now(time.monotonic(), time.time_ns())
