"""Event feeds of jobs: one stream from the controller per job, for any number of watchers."""

from __future__ import annotations

import asyncio
import collections
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence

import grpc.aio

from miles.gateway.cache import AnswerCache
from miles.gateway.controller_client import ControllerClient
from miles.gateway.event_ring import EventRing, Message, parse_id, pieces
from miles.gateway.problems import Problem
from miles.gateway.schemas import event_model
from miles.rpc.gen import controller_pb2, job_pb2
from miles.tasks import cancel

logger = logging.getLogger(__name__)

RING = 2000
"""Number of newest events of a job that are kept in memory."""
RING_BYTES = 8 << 20
PAGE = 250
_PAGES = 16
"""Cached pages of older events: watchers mostly request the same ones."""
_IDLE_S = 30.0
"""Time without watchers after which a feed is closed."""
_RETRY_S = 0.5
_WATCHER_S = 0.004
_LONGEST_S = 1.0
"""Watchers are notified at most once per `_WATCHER_S` × number of watchers, up to `_LONGEST_S`: at any rate of events,
sending them to hundreds of watchers takes about a hundredth of a core."""
_WOKEN_AT_ONCE = 16
"""Watchers woken at a time. The batches are spread over half of that interval: waking all at once would occupy a core
for milliseconds, and longer on a busy machine, while every request waits."""

END = b'event: end\ndata: {"type":"end"}\n\n'
"""Last message of a stream whose job has ended: the reader need not reconnect."""
ALIVE = b": alive\n\n"


def encode(event: job_pb2.JobEvent) -> Message:
    """Encode an event as server-sent event."""
    model = event_model(event)
    data = f"id: {event.event_id}\nevent: {model.type}\ndata: {model.model_dump_json()}\n\n".encode()
    return Message(parse_id(event.event_id), event.event_id, data)


class Feed:
    """Follows the events of one job and keeps the newest ones."""

    def __init__(self, controller: ControllerClient, job_id: str, on_state: Callable[[str], None]) -> None:
        """`on_state` is called with the job's id before watchers see a change of its state."""
        self.job_id = job_id
        self.watchers = 0
        self.unused_since_s = time.monotonic()
        self.ring = EventRing(RING, RING_BYTES)
        self.ended = False
        """Whether the job has ended and all of its events have arrived."""
        self.failure: Problem | None = None
        """Why the feed cannot continue; None while it can."""
        self.changes = 0
        """How often watchers were notified."""
        self._controller = controller
        self._on_state = on_state
        self._waiting: set[asyncio.Future[bool]] = set()
        self._notified_s = 0.0
        self._notifying: asyncio.TimerHandle | None = None
        self._to_wake: collections.deque[asyncio.Future[bool]] = collections.deque()
        self._waking: asyncio.TimerHandle | None = None
        self._task = asyncio.create_task(self._follow(), name=f"events of {job_id}")
        self._task.add_done_callback(lambda _: self._notify(at_once=True))

    async def close(self) -> None:
        await cancel(self._task)

    @property
    def closed(self) -> bool:
        """Whether no events will follow."""
        return self._task.done()

    async def changed(self, seen: int, timeout_s: float) -> bool:
        """Return True once `changes` differs from `seen`, False after the timeout."""
        if self.changes != seen:
            return True
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[bool] = loop.create_future()
        self._waiting.add(waiter)
        timeout = loop.call_later(timeout_s, _resolve, waiter, False)
        try:
            return await waiter
        finally:
            timeout.cancel()
            self._waiting.discard(waiter)

    async def _follow(self) -> None:
        while not self.ended:
            newest = self.ring.newest_id
            request = controller_pb2.WatchJobRequest(
                job_id=self.job_id, after_event_id=newest, newest=0 if newest else RING
            )
            try:
                async for response in self._controller.watch(request):
                    self._take(response.event)
                self.ended = True
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    self.failure = Problem("unknown-job", error.details() or "the job no longer exists")
                    return
                logger.info("events of %s: %s; trying again", self.job_id, error.details())
                await asyncio.sleep(_RETRY_S)

    def _take(self, event: job_pb2.JobEvent) -> None:
        self.ring.append(encode(event))
        if event.HasField("state_changed"):
            # The record was written with the event, so reads from now on return the new state.
            self._on_state(self.job_id)
            self._notify(at_once=True)
        else:
            self._notify_soon()

    def _notify_soon(self) -> None:
        """Notify watchers now, or soon together with events that arrive until then."""
        if self._notifying is not None:
            return
        wait_s = self._notified_s + self._interval_s() - time.monotonic()
        if wait_s <= 0:
            self._notify()
        else:
            self._notifying = asyncio.get_running_loop().call_later(wait_s, self._notify)

    def _interval_s(self) -> float:
        """Return the shortest time between two notifications of watchers."""
        return min(_LONGEST_S, self.watchers * _WATCHER_S)

    def _notify(self, *, at_once: bool = False) -> None:
        if self._notifying is not None:
            self._notifying.cancel()
            self._notifying = None
        self._notified_s = time.monotonic()
        self.changes += 1
        self._to_wake.extend(self._waiting)
        self._waiting.clear()
        if at_once or self._waking is None:
            turns = math.ceil(len(self._to_wake) / _WOKEN_AT_ONCE)
            self._wake(0.0 if at_once or not turns else self._interval_s() / 2 / turns)

    def _wake(self, pause_s: float) -> None:
        """Wake some watchers, and the next ones after a pause; with a pause of 0, after other pending callbacks."""
        if self._waking is not None:
            self._waking.cancel()
            self._waking = None
        for _ in range(min(_WOKEN_AT_ONCE, len(self._to_wake))):
            _resolve(self._to_wake.popleft(), True)
        if self._to_wake:
            self._waking = asyncio.get_running_loop().call_later(pause_s, self._wake, pause_s)


def _resolve(waiter: asyncio.Future[bool], value: bool) -> None:
    if not waiter.done():
        waiter.set_result(value)


class Feeds:
    """Feeds by job: opened for the first watcher, and closed some time after the last has left."""

    def __init__(self, controller: ControllerClient, on_state: Callable[[str], None]) -> None:
        """`on_state` is called with a job's id before watchers see a change of its state."""
        self._controller = controller
        self._on_state = on_state
        self._feeds: dict[str, Feed] = {}
        self._pages: AnswerCache[Sequence[Message]] = AnswerCache(keep_s=5.0, size=_PAGES)
        self.watchers = 0
        """Watchers of all jobs together."""

    async def close(self) -> None:
        """Close every feed."""
        await asyncio.gather(*(feed.close() for feed in self._feeds.values()))
        self._feeds.clear()

    async def tidy(self) -> None:
        """Close feeds without watchers, until cancelled."""
        while True:
            await asyncio.sleep(_IDLE_S / 4)
            now = time.monotonic()
            for job_id, feed in list(self._feeds.items()):
                if feed.watchers == 0 and now - feed.unused_since_s > _IDLE_S:
                    del self._feeds[job_id]
                    await feed.close()

    async def events(
        self, job_id: str, after: str, *, heartbeat_s: float, end_s: float, follow: bool = True
    ) -> AsyncIterator[bytes]:
        """Yield a job's events after the given one, as server-sent events, until the job has ended or `end_s`
        (monotonic)."""
        feed = self._open(job_id)
        feed.watchers += 1
        self.watchers += 1
        try:
            cursor, event_id = (parse_id(after), after) if after else ((0, 0), "")
            while True:
                seen, ended, closed = feed.changes, feed.ended, feed.closed  # read first, so that no event is missed
                piece = feed.ring.after(cursor) if feed.ring.reaches(cursor) else None
                if piece is not None:
                    yield piece.data
                    cursor, event_id = piece.id, piece.event_id
                    continue
                # Without following, the ring may not have all events yet.
                page = [] if feed.ring.reaches(cursor) and follow else await self._page(job_id, event_id)
                if page and not event_id:
                    feed.ring.begins_with(page[0])
                for piece in pieces(page):
                    yield piece.data
                    cursor, event_id = piece.id, piece.event_id
                if page:
                    continue
                if ended or feed.failure is not None:
                    yield END
                    return
                if closed or not follow or time.monotonic() >= end_s:
                    return  # the feed has failed, or the gateway stops: readers reconnect
                if not await feed.changed(seen, min(heartbeat_s, max(0.0, end_s - time.monotonic()))):
                    yield ALIVE
        finally:
            feed.watchers -= 1
            self.watchers -= 1
            feed.unused_since_s = time.monotonic()

    def _open(self, job_id: str) -> Feed:
        feed = self._feeds.get(job_id)
        if feed is None or feed.closed:
            # A job that had ended may have been resumed: a new feed follows it.
            feed = self._feeds[job_id] = Feed(self._controller, job_id, self._on_state)
        return feed

    async def _page(self, job_id: str, after: str) -> Sequence[Message]:
        async def read() -> Sequence[Message]:
            return [encode(event) for event in await self._controller.events(job_id, after, PAGE)]

        page = await self._pages.get((job_id, after), read)
        if len(page) < PAGE:
            self._pages.forget((job_id, after))  # more events may have arrived since
        return page
