"""One stream of weights at run time: feeds the publication state machine events and carries out its actions."""

from __future__ import annotations

import asyncio
import itertools
import logging
import pathlib
import time
from collections.abc import Collection
from typing import Any

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.services.weightsync import snapshot
from miles.services.weightsync.publication import Publication
from miles.services.weightsync.records import (
    Action,
    Disconnect,
    Ended,
    Engine,
    EngineChanged,
    Free,
    Now,
    Order,
    OrderKind,
    Outcome,
    Send,
    Settings,
    UnknownVersion,
)
from miles.services.weightsync.segments import Segment, SegmentStore
from miles.services.weightsync.store import StateStore
from miles.weights import manifest as manifests

logger = logging.getLogger(__name__)

Event = weightsync_pb2.EngineStatus | Outcome
"""What watchers of an activation see: engines' stages, then the outcome."""

_sessions = itertools.count(1)


def stream_key(job_id: str, stream: policy_pb2.WeightStream.ValueType) -> str:
    """Names a stream in files and state."""
    return f"{job_id}/{manifests.stream_name(stream)}"


class StreamRuntime:
    """The publications of one stream of one job. All methods run on the event loop."""

    def __init__(
        self,
        job_id: str,
        stream: policy_pb2.WeightStream.ValueType,
        store: StateStore,
        segments: SegmentStore,
        settings: Settings,
    ) -> None:
        self.job_id = job_id
        self.stream = stream
        self.key = stream_key(job_id, stream)
        self.machine = Publication(settings)
        self._store = store
        self._segment_store = segments
        self._segments: dict[int, Segment] = {}
        self._manifests: dict[int, policy_pb2.Manifest] = {}
        self._subscriptions: dict[int, asyncio.Queue[weightsync_pb2.SubscribeResponse | None]] = {}
        self._watchers: dict[asyncio.Queue[Event], str] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._allocating = asyncio.Lock()
        self.activations_ended = 0

    def restore(self, saved: dict[str, Any]) -> set[pathlib.Path]:
        """Take up the state of an earlier process; returns the files it knows.

        Versions whose bytes are gone are lost.
        """
        self.machine = snapshot.load(saved, _now(), self.machine.settings)
        for publication_id, path, nbytes, manifest in self._store.segments(self.key):
            if path.exists() and path.stat().st_size >= nbytes:
                self._segments[publication_id] = Segment(path, nbytes)
                if manifest is not None:
                    self._manifests[publication_id] = policy_pb2.Manifest.FromString(manifest)
        for publication_id, version in list(self.machine.versions.items()):
            if publication_id not in self._segments or (version.checksum and publication_id not in self._manifests):
                logger.warning("%s: the bytes of version %d are gone", self.key, version.number)
                self._store.delete_segment(self.key, publication_id)
                self._apply(self.machine.give_up(publication_id, _now()))
        for publication_id in set(self._segments) - set(self.machine.versions):
            del self._segments[publication_id]
            self._store.delete_segment(self.key, publication_id)
        return {segment.path for segment in self._segments.values()}

    # -- the trainer's calls ------------------------------------------------------------------------------------------

    async def allocate(self, number: int, nbytes: int) -> weightsync_pb2.TransportHandle:
        """Room for a version; raises OutOfMemory."""
        async with self._allocating:
            version, actions = self.machine.allocate(number, nbytes, _now())
            self._apply(actions)
            publication_id = version.publication_id
            try:
                segment = await asyncio.to_thread(
                    self._segment_store.allocate, self.key, number, publication_id, nbytes
                )
            except OSError:
                self._apply(self.machine.give_up(publication_id, _now()))
                raise
            if publication_id not in self.machine.versions:
                self._segment_store.free(self.key, segment, reusable=False)
                raise UnknownVersion("the job was released meanwhile")
            self._segments[publication_id] = segment
            self._store.save_segment(self.key, publication_id, segment.path, segment.nbytes)
            return self._handle(publication_id)

    def prepare(self, manifest: policy_pb2.Manifest, path: str) -> None:
        """The bytes at `path` are complete; raises Refused or UnknownVersion."""
        found = [publication_id for publication_id, s in self._segments.items() if str(s.path) == path]
        if not found or self.machine.versions[found[0]].number != manifest.version.version:
            raise UnknownVersion(f"{path} is not allocated for it; allocate again")
        if manifest.total_bytes > self._segments[found[0]].nbytes:
            raise UnknownVersion(f"{path} is too small for its {manifest.total_bytes} bytes; allocate again")
        actions = self.machine.prepare(found[0], manifest.checksum, _now())
        if found[0] not in self._manifests:
            self._store.save_manifest(self.key, found[0], manifest.SerializeToString())
            self._manifests[found[0]] = manifest
        self._apply(actions)

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

    def unwatch(self, events: asyncio.Queue[Event]) -> None:
        """Nobody reads these events any more; the activation goes on."""
        self._watchers.pop(events, None)

    def release(self) -> int:
        """Free everything the stream has; returns the bytes freed."""
        freed = sum(segment.nbytes for segment in self._segments.values())
        self._apply(self.machine.release(_now()))
        freed += self._segment_store.free_spare(self.key)
        self._store.delete_stream(self.key)
        return freed

    # -- the engines' calls -------------------------------------------------------------------------------------------

    def subscribe(
        self, hello: weightsync_pb2.EngineHello
    ) -> tuple[int, asyncio.Queue[weightsync_pb2.SubscribeResponse | None]]:
        """Attach an engine; its orders come through the queue, None ends it."""
        session = next(_sessions)
        orders: asyncio.Queue[weightsync_pb2.SubscribeResponse | None] = asyncio.Queue()
        self._subscriptions[session] = orders
        number = hello.version if hello.HasField("version") else None
        self._apply(self.machine.connect(hello.engine_id, session, number, hello.manifest_checksum, _now()))
        return session, orders

    def unsubscribe(self, engine_id: str, session: int) -> None:
        """The engine's subscription has ended."""
        self._subscriptions.pop(session, None)
        self._apply(self.machine.disconnect(engine_id, session, _now()))

    def report(self, engine_id: str, session: int, report: weightsync_pb2.EngineReport) -> None:
        """An engine answered an order."""
        done = report.outcome == weightsync_pb2.ORDER_OUTCOME_DONE
        error = None if done else report.error or "it did not say why"
        self._apply(
            self.machine.report(engine_id, session, report.order_id, error, report.elapsed_s, report.pause_s, _now())
        )

    # -- answers ------------------------------------------------------------------------------------------------------

    def version_statuses(self) -> list[weightsync_pb2.VersionStatus]:
        """Every version whose bytes exist, oldest first."""
        return [
            weightsync_pb2.VersionStatus(
                version=self._name(version.number),
                state=weightsync_pb2.VersionState.Value(f"VERSION_STATE_{version.state.value}"),
                total_bytes=version.nbytes,
                active_unix_ns=version.active_unix_ns,
            )
            for version in self.machine.versions.values()
        ]

    def engine_status(self, engine: Engine) -> weightsync_pb2.EngineStatus:
        """An engine as the wire shows it."""
        status = weightsync_pb2.EngineStatus(
            engine_id=engine.engine_id,
            stream=self.stream,
            state=weightsync_pb2.EngineState.Value(f"ENGINE_STATE_{engine.state.value}"),
            since_unix_ns=engine.since_unix_ns,
            prefetch_s=engine.prefetch_s,
            pause_s=engine.pause_s,
            last_error=engine.last_error,
        )
        if engine.held is not None and engine.held in self.machine.versions:
            status.version = self.machine.versions[engine.held].number
        return status

    def close(self) -> None:
        """End every subscription and stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
        for orders in self._subscriptions.values():
            orders.put_nowait(None)

    # -- carrying out -------------------------------------------------------------------------------------------------

    def _apply(self, actions: list[Action]) -> None:
        """Make the new state durable, then act on it."""
        self._store.save_stream(self.key, snapshot.save(self.machine))
        for action in actions:
            match action:
                case Send(session=session, order=order):
                    if session in self._subscriptions:
                        self._subscriptions[session].put_nowait(self._order(order))
                case Free(publication_id=publication_id, reusable=reusable):
                    self._free(publication_id, reusable)
                case EngineChanged(engine_id=engine_id):
                    self._show(engine_id)
                case Ended(operation_ids=operation_ids, outcome=outcome):
                    self._finish(operation_ids, outcome)
                case Disconnect(session=session):
                    if session in self._subscriptions:
                        self._subscriptions[session].put_nowait(None)
        self._set_timer()

    def _free(self, publication_id: int, reusable: bool) -> None:
        self._manifests.pop(publication_id, None)
        segment = self._segments.pop(publication_id, None)
        if segment is not None:
            self._segment_store.free(self.key, segment, reusable)
            self._store.delete_segment(self.key, publication_id)

    def _show(self, engine_id: str) -> None:
        engine = self.machine.engines.get(engine_id)
        if engine is None:
            return
        status = self.engine_status(engine)
        if engine.quarantined:
            logger.warning("%s: engine %s is quarantined: %s", self.key, engine_id, engine.last_error)
        for events in self._watchers:
            events.put_nowait(status)

    def _finish(self, operation_ids: tuple[str, ...], outcome: Outcome) -> None:
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
            delay_s = max(0.0, wake_at_s - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._tick)

    def _tick(self) -> None:
        self._apply(self.machine.tick(_now()))

    def _order(self, order: Order) -> weightsync_pb2.SubscribeResponse:
        response = weightsync_pb2.SubscribeResponse(order_id=order.order_id)
        publication_id = order.publication_id
        if order.kind is OrderKind.QUARANTINE:
            response.quarantine.reason = order.reason
        elif order.kind is OrderKind.PREFETCH:
            response.prefetch.manifest.CopyFrom(self._manifests[publication_id])
            response.prefetch.handle.CopyFrom(self._handle(publication_id))
            response.prefetch.publication_id = publication_id
        elif order.kind is OrderKind.CHECK:
            response.check.manifest.CopyFrom(self._manifests[publication_id])
        else:
            body = response.swap if order.kind is OrderKind.SWAP else response.drop
            body.version.CopyFrom(self._name(order.number))
            body.publication_id = publication_id
        return response

    def _handle(self, publication_id: int) -> weightsync_pb2.TransportHandle:
        segment = self._segments[publication_id]
        return weightsync_pb2.TransportHandle(
            kind=weightsync_pb2.TRANSPORT_KIND_SHARED_MEMORY,
            shared_memory=weightsync_pb2.SharedMemoryHandle(path=str(segment.path), nbytes=segment.nbytes),
        )

    def _name(self, number: int) -> policy_pb2.WeightVersion:
        return policy_pb2.WeightVersion(job_id=self.job_id, stream=self.stream, version=number)


def _now() -> Now:
    return Now(time.monotonic(), time.time_ns())
