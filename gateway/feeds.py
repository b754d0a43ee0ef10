"""Events of jobs for many watchers: one stream from the controller for each job, however many follow it."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Sequence

import grpc.aio

from miles.gateway.cache import AnswerCache
from miles.gateway.controller import Controller
from miles.gateway.models import event_model
from miles.gateway.problems import Problem
from miles.rpc.gen import controller_pb2, job_pb2

logger = logging.getLogger(__name__)

RING = 2000
"""Newest events of a job that are kept at hand."""
PAGE = 500
_IDLE_S = 30.0
"""A feed that nobody follows for so long is closed."""
_RETRY_S = 0.5
_WATCHER_S = 0.00125
_LONGEST_S = 0.25
"""Watchers are woken at most once in `_WATCHER_S` for each of them, up to `_LONGEST_S`: however fast events come,
sending them to many takes a small part of a core."""

END = b'event: end\ndata: {"type":"end"}\n\n'
"""Last message of a stream whose job has ended: nothing follows, so the reader need not come back."""
ALIVE = b": alive\n\n"

EventId = tuple[int, int]


def parse_id(event_id: str) -> EventId:
    """An event id as numbers that can be compared; raises ValueError."""
    first, dash, second = event_id.partition("-")
    if not dash:
        raise ValueError(event_id)
    return int(first), int(second)


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One event, ready to be sent."""

    id: EventId
    event_id: str
    data: bytes


def encode(event: job_pb2.JobEvent) -> Message:
    """An event as server-sent event."""
    model = event_model(event)
    data = f"id: {event.event_id}\nevent: {model.type}\ndata: {model.model_dump_json()}\n\n".encode()
    return Message(parse_id(event.event_id), event.event_id, data)


class Feed:
    """Follows one job and keeps its newest events."""

    def __init__(self, controller: Controller, job_id: str) -> None:
        self.job_id = job_id
        self.watchers = 0
        self.unused_since_s = time.monotonic()
        self.ended = False
        """The job has ended and every event is here."""
        self.failure: Problem | None = None
        """Why this feed cannot go on at all."""
        self._controller = controller
        self._ring: collections.deque[Message] = collections.deque(maxlen=RING)
        self._changed = asyncio.Event()
        self._told_s = 0.0
        self._telling: asyncio.TimerHandle | None = None
        self._task = asyncio.create_task(self._follow(), name=f"events of {job_id}")

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    @property
    def closed(self) -> bool:
        """Whether nothing new will come."""
        return self._task.done()

    def after(self, cursor: EventId) -> Sequence[Message] | None:
        """Events at hand after the given one; None when there may be some between it and those at hand."""
        if not self._ring or self._ring[0].id > cursor:
            return None
        newer: list[Message] = []
        for message in reversed(self._ring):
            if message.id <= cursor:
                break
            newer.append(message)
        newer.reverse()
        return newer

    @property
    def news(self) -> asyncio.Event:
        """Set at the next change."""
        return self._changed

    async def _follow(self) -> None:
        try:
            while not self.ended:
                newest = self._ring[-1].event_id if self._ring else ""
                request = controller_pb2.WatchJobRequest(
                    job_id=self.job_id, after_event_id=newest, newest=0 if newest else RING
                )
                try:
                    async for response in self._controller.watch(request):
                        self._ring.append(encode(response.event))
                        self._notify()
                    self.ended = True
                except grpc.aio.AioRpcError as error:
                    if error.code() is grpc.StatusCode.NOT_FOUND:
                        self.failure = Problem("unknown-job", error.details() or "the job is gone")
                        return
                    logger.info("events of %s: %s; trying again", self.job_id, error.details())
                    await asyncio.sleep(_RETRY_S)
        finally:
            self._tell()

    def _notify(self) -> None:
        """Tell watchers of news: now, or soon together with what comes until then."""
        if self._telling is not None:
            return
        wait_s = self._told_s + min(_LONGEST_S, self.watchers * _WATCHER_S) - time.monotonic()
        if wait_s <= 0:
            self._tell()
        else:
            self._telling = asyncio.get_running_loop().call_later(wait_s, self._tell)

    def _tell(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        self._told_s = time.monotonic()
        self._changed.set()
        self._changed = asyncio.Event()


class Feeds:
    """Feeds by job, opened for the first watcher and closed some time after the last."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._feeds: dict[str, Feed] = {}
        self._pages: AnswerCache[Sequence[Message]] = AnswerCache(keep_s=5.0, size=64)
        self.watchers = 0
        """Watchers of all jobs together."""

    async def close(self) -> None:
        """Close every feed."""
        await asyncio.gather(*(feed.close() for feed in self._feeds.values()))
        self._feeds.clear()

    async def tidy(self) -> None:
        """Close feeds that nobody follows, until cancelled."""
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
        """A job's events after the given one, as server-sent events, until the job or `end_s` (monotonic) has ended."""
        feed = self._open(job_id)
        feed.watchers += 1
        self.watchers += 1
        try:
            cursor, event_id = (parse_id(after), after) if after else ((0, 0), "")
            while True:
                ended, news = feed.ended, feed.news  # before looking: what comes in between is not missed
                batch = feed.after(cursor)
                if batch is None or not (batch or follow):  # without following, what is at hand may not be all yet
                    batch = await self._page(job_id, event_id)
                if batch:
                    yield b"".join(message.data for message in batch)
                    cursor, event_id = batch[-1].id, batch[-1].event_id
                elif ended or feed.failure is not None:
                    yield END
                    return
                elif not follow or time.monotonic() >= end_s:
                    return
                elif not await _is_set_within(news, min(heartbeat_s, max(0.0, end_s - time.monotonic()))):
                    yield ALIVE
        finally:
            feed.watchers -= 1
            self.watchers -= 1
            feed.unused_since_s = time.monotonic()

    def _open(self, job_id: str) -> Feed:
        feed = self._feeds.get(job_id)
        if feed is None or feed.closed:
            # A job that had ended may have been resumed since: a new feed finds out.
            feed = self._feeds[job_id] = Feed(self._controller, job_id)
        return feed

    async def _page(self, job_id: str, after: str) -> Sequence[Message]:
        async def read() -> Sequence[Message]:
            return [encode(event) for event in await self._controller.events(job_id, after, PAGE)]

        page = await self._pages.get((job_id, after), read)
        if len(page) < PAGE:
            self._pages.forget((job_id, after))  # more may have come since
        return page


async def _is_set_within(event: asyncio.Event, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True
