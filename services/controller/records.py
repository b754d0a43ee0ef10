"""Jobs and their events as records in Redis."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import redis.asyncio
from redis.exceptions import WatchError

from miles.rpc.gen import job_pb2

_JOBS = "miles:jobs"
"""Sorted set of job ids by time of submission."""
_REQUESTS = "miles:requests"
"""Hash of request id -> job id: the idempotency keys."""
_MAX_EVENTS = 200_000
_WATCH_BLOCK_MS = 1_000

ENDED = frozenset(
    {job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED, job_pb2.JOB_STATE_STOPPED}
)


def _job_key(job_id: str) -> str:
    return f"miles:job:{job_id}"


def _events_key(job_id: str) -> str:
    return f"miles:{job_id}:events"


class UnknownJobError(KeyError):
    """No job has this id."""


class JobStore:
    """Every job ever submitted, and what happened to it. Survives the controller: all state is in Redis."""

    def __init__(self, redis_client: redis.asyncio.Redis) -> None:
        self._redis: Any = redis_client  # redis-py's annotations leave open what a reply is

    async def submit(self, job: job_pb2.Job, request_id: str) -> tuple[job_pb2.Job, bool]:
        """Store a new job and return (job, True), or the one that `request_id` stored before and False."""
        async with self._redis.pipeline(transaction=True) as pipe:
            while True:
                try:
                    await pipe.watch(_REQUESTS)
                    known = await pipe.hget(_REQUESTS, request_id) if request_id else None
                    if known is not None:
                        await pipe.unwatch()
                        return await self.get(known.decode()), False
                    pipe.multi()
                    pipe.set(_job_key(job.job_id), job.SerializeToString())
                    pipe.zadd(_JOBS, {job.job_id: job.submitted_unix_ns})
                    if request_id:
                        pipe.hset(_REQUESTS, request_id, job.job_id)
                    await pipe.execute()
                    return job, True
                except WatchError:
                    continue

    async def get(self, job_id: str) -> job_pb2.Job:
        """The job's record. Raises `UnknownJobError`."""
        data = await self._redis.get(_job_key(job_id))
        if data is None:
            raise UnknownJobError(job_id)
        return job_pb2.Job.FromString(data)

    async def put(self, job: job_pb2.Job) -> None:
        """Replace the job's record."""
        await self._redis.set(_job_key(job.job_id), job.SerializeToString())

    async def list(
        self, states: frozenset[int] = frozenset(), page_size: int = 100, page_token: str = ""
    ) -> tuple[list[job_pb2.Job], str]:
        """A page of jobs, newest first, and the token of the next page (empty: none)."""
        start = int(page_token) if page_token else 0
        jobs: list[job_pb2.Job] = []
        position = start
        while len(jobs) < page_size:
            ids = await self._redis.zrevrange(_JOBS, position, position + page_size - 1)
            if not ids:
                return jobs, ""
            for job_id in ids:
                position += 1
                job = await self.get(job_id.decode())
                if not states or job.state in states:
                    jobs.append(job)
                if len(jobs) == page_size:
                    break
        more = position < await self._redis.zcard(_JOBS)
        return jobs, str(position) if more else ""

    async def add_event(self, event: job_pb2.JobEvent) -> None:
        """Append to the job's history; sets the event's time."""
        event.unix_ns = time.time_ns()
        await self._redis.xadd(
            _events_key(event.job_id), {"event": event.SerializeToString()}, maxlen=_MAX_EVENTS, approximate=True
        )

    async def newest_event_id(self, job_id: str) -> str:
        """Id of the job's last event; empty when nothing has happened yet."""
        newest = await self._redis.xrevrange(_events_key(job_id), count=1)
        return newest[0][0].decode() if newest else ""

    async def watch(self, job_id: str, after_event_id: str) -> AsyncIterator[job_pb2.JobEvent]:
        """Events after the given one, then new ones, until the job has ended and everything was read."""
        cursor = after_event_id or "0-0"
        while True:
            ended = (await self.get(job_id)).state in ENDED
            block = None if ended else _WATCH_BLOCK_MS
            reply = await self._redis.xread({_events_key(job_id): cursor}, count=500, block=block)
            if not reply and ended:
                return
            for _, entries in reply:
                for entry_id, fields in entries:
                    cursor = entry_id.decode()
                    event = job_pb2.JobEvent.FromString(fields[b"event"])
                    event.event_id = cursor
                    yield event


def new_job(config: dict[str, object], num_rollout: int) -> job_pb2.Job:
    """A job record for a validated configuration."""
    return job_pb2.Job(
        job_id=f"{config.get('name') or 'job'}-{uuid.uuid4().hex[:8]}",
        name=str(config.get("name") or ""),
        state=job_pb2.JOB_STATE_QUEUED,
        config_json=json.dumps(config),
        num_rollout=num_rollout,
        submitted_unix_ns=time.time_ns(),
    )
