"""Jobs and their events as records in Redis."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import redis.asyncio

from miles.queue import RedisUnsuitable
from miles.queue.redis_lease import KEY as CONTROLLER
from miles.rpc.gen import job_pb2
from miles.services.controller.errors import BadPageToken, BadRequestError, ConflictError, NotFoundError
from miles.services.controller.jobs.records import ENDED, read_record
from miles.services.controller.jobs.shared_folders import refuse_earlier, refuse_shared

_JOBS = "miles:jobs"
"""Sorted set of job ids by time of submission."""
_REQUESTS = "miles:requests"
"""Hash of request id -> job id: the idempotency keys."""
_RUN_DIRS = "miles:run_dirs"
"""Hash of run folder -> job id: two jobs in one folder would load each other's checkpoints."""
_SUBMIT = """
local requests, run_dirs, jobs, key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local request, run_dir, job, score, record = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
if request ~= '' then
  local known = redis.call('HGET', requests, request)
  if known then return {'known', known} end
end
if run_dir ~= '' then
  local owner = redis.call('HGET', run_dirs, run_dir)
  if owner then return {'taken', owner} end
  redis.call('HSET', run_dirs, run_dir, job)
end
redis.call('SET', key, record)
redis.call('ZADD', jobs, score, job)
if request ~= '' then redis.call('HSET', requests, request, job) end
return {'stored', job}
"""
"""Stores a job unless its request or its run folder is known; atomic, so that no two jobs can."""
_OPERATIONS_S = 7 * 24 * 3600
"""How long the idempotency keys of a job's actions are remembered after the last one."""
_MAX_EVENTS = 200_000
_WATCH_BLOCK_MS = 1_000


def _job_key(job_id: str) -> str:
    return f"miles:job:{job_id}"


def _events_key(job_id: str) -> str:
    return f"miles:{job_id}:events"


def _operations_key(job_id: str) -> str:
    return f"miles:{job_id}:operations"


class UnknownJobError(NotFoundError):
    """No job has this id."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"no job {job_id!r}; list the jobs to see their ids")


_WRITE = """
-- KEYS job, events ; ARGV record or '', event or '', max_events
-- A full Redis refuses a script's first write, but never PERSIST; a job that could not be recorded could free nothing.
redis.call('PERSIST', KEYS[1])
if ARGV[1] ~= '' then redis.call('SET', KEYS[1], ARGV[1]) end
if ARGV[2] ~= '' then redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[3], '*', 'event', ARGV[2]) end
return 1
"""

_ADD_OPERATION = """
-- KEYS operations ; ARGV operation_id, action, keep_s
redis.call('PERSIST', KEYS[1])
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
"""

_LEASE_NUMBER = "miles:lease_number"
_LEASES_A_LIFE = 1 << 24
"""More than one life of the controller gives."""
_FIRST_LEASE_NUMBER = """
-- KEYS lease_number ; ARGV now_ms, leases_a_life
redis.call('PERSIST', KEYS[1])
local before = tonumber(redis.call('GET', KEYS[1]) or -ARGV[2])
local first = string.format('%.0f', math.max(tonumber(ARGV[1]), before + tonumber(ARGV[2])))
redis.call('SET', KEYS[1], first)
return first
"""


class RunDirTakenError(ConflictError):
    """Another job has this run folder."""

    def __init__(self, run_dir: str, job_id: str) -> None:
        super().__init__(
            f"run_dir = {run_dir}, but job {job_id} has that folder; resume that job, or choose another name or run_dir"
        )


class JobStore:
    """Every job ever submitted, and its events. Survives the controller: all state is in Redis."""

    def __init__(self, redis_client: redis.asyncio.Redis) -> None:
        self._redis: Any = redis_client  # redis-py's annotations leave open what a reply is
        self._write_script = redis_client.register_script(_WRITE)
        self._operation_script = redis_client.register_script(_ADD_OPERATION)
        self._lease_number_script = redis_client.register_script(_FIRST_LEASE_NUMBER)
        self._submitting = asyncio.Lock()

    async def submit(self, job: job_pb2.Job, request_id: str, *, is_run: bool = False) -> tuple[job_pb2.Job, bool]:
        """Store a new job and return (job, True), or the one that `request_id` stored before and False.

        With `is_run` the run folder says which job it is: the same folder is the same job, and a request id that came
        with another folder is another run's. Raises RunDirTakenError when another job has the run folder, and
        SharedFolderError when one that has not ended has another folder in common.
        """
        async with self._submitting:  # this controller alone writes here, one submission at a time
            known = await self._known(job, request_id, is_run)
            if known is not None:
                return known, False
            await self.refuse_shared(job)
            if not (is_run and request_id):
                await self._refuse_taken(job)
                await asyncio.to_thread(refuse_earlier, job)
            return await self._store_new(job, "" if is_run else request_id)

    async def refuse_shared(self, job: job_pb2.Job, *, but_its_own: bool = False) -> None:
        """Raise SharedFolderError when a job that has not ended has an output folder in common with this one.

        `but_its_own` leaves out one in the same run folder: it may be this job, submitted before.
        """
        if own := _run_dir(job):
            live = [other for other in await self.live() if not (but_its_own and _run_dir(other) == own)]
            await asyncio.to_thread(refuse_shared, job, live)

    async def _refuse_taken(self, job: job_pb2.Job) -> None:
        """Raise RunDirTakenError when a job that this Redis knows, ended or not, has the run folder."""
        if own := _run_dir(job):
            owner = await self._redis.hget(_RUN_DIRS, own)
            if owner is not None:
                raise RunDirTakenError(own, owner.decode())

    async def live(self) -> list[job_pb2.Job]:
        """Return every job that has not ended."""
        found: list[job_pb2.Job] = []
        token = ""
        while True:
            page, token = await self.list(page_token=token)
            found += [job for job in page if job.state not in ENDED]
            if not token:
                return found

    async def _known(self, job: job_pb2.Job, request_id: str, is_run: bool) -> job_pb2.Job | None:
        """Return the job that was submitted before by this request or, for a run, in this folder."""
        if not request_id:
            return None
        job_id = await self._redis.hget(_REQUESTS, request_id)
        known = None if job_id is None else await self.get(job_id.decode())
        if known is not None and (not is_run or _run_dir(known) == _run_dir(job)):
            return known
        job_id = await self._redis.hget(_RUN_DIRS, _run_dir(job)) if is_run else None
        return None if job_id is None else await self.get(job_id.decode())

    async def _store_new(self, job: job_pb2.Job, request_id: str) -> tuple[job_pb2.Job, bool]:
        outcome, job_id = await self._redis.eval(
            _SUBMIT,
            4,
            *(_REQUESTS, _RUN_DIRS, _JOBS, _job_key(job.job_id)),
            *(request_id, _run_dir(job), job.job_id, job.submitted_unix_ns, job.SerializeToString()),
        )
        if outcome == b"known":
            return await self.get(job_id.decode()), False
        if outcome == b"taken":
            raise RunDirTakenError(_run_dir(job), job_id.decode())
        return job, True

    async def check_keys(self) -> None:
        """Raise RedisUnsuitable when another application has keys of these names."""
        kinds = {
            _JOBS: b"zset",
            _REQUESTS: b"hash",
            _RUN_DIRS: b"hash",
            _LEASE_NUMBER: b"string",
            CONTROLLER: b"string",
        }
        for key, kind in kinds.items():
            found = await self._redis.type(key)
            if found not in (b"none", kind):
                problem = f"the key {key} in Redis is a {found.decode()} and not a {kind.decode()}"
                raise RedisUnsuitable(
                    f"{problem}: another application uses this database; choose another (redis://HOST/1)"
                )

    async def is_emptied(self) -> bool:
        """Return whether what `first_lease_number` stored is gone: somebody has emptied Redis."""
        return not await self._redis.exists(_LEASE_NUMBER)

    async def first_lease_number(self) -> int:
        """Return a worker lease number above all given before on this Redis, even if the clock was set back."""
        now_ms = time.time_ns() // 1_000_000
        return int(await self._lease_number_script(keys=[_LEASE_NUMBER], args=[now_ms, _LEASES_A_LIFE]))

    async def get(self, job_id: str) -> job_pb2.Job:
        """Return the job's record. Raises UnknownJobError."""
        data = (await self._redis.mget([_job_key(job_id)]))[0]
        if data is None:
            raise UnknownJobError(job_id)
        return read_record(job_id, data)

    async def put(self, job: job_pb2.Job, event: job_pb2.JobEvent | None = None) -> None:
        """Replace the job's record and append an event, atomically."""
        await self._write(job.job_id, job.SerializeToString(), event)

    async def _write(self, job_id: str, record: bytes, event: job_pb2.JobEvent | None) -> None:
        keys = [_job_key(job_id), _events_key(job_id)]
        data = b""
        if event is not None:
            event.unix_ns = time.time_ns()
            data = event.SerializeToString()
        await self._write_script(keys=keys, args=[record, data, _MAX_EVENTS])

    async def operation(self, job_id: str, operation_id: str) -> int | None:
        """Return the action of an earlier operation; None when the operation is new."""
        action = await self._redis.hget(_operations_key(job_id), operation_id)
        return None if action is None else int(action)

    async def add_operation(self, job_id: str, operation_id: str, action: int) -> None:
        """Remember that an operation was carried out."""
        args: list[str | int] = [operation_id, action, _OPERATIONS_S]
        await self._operation_script(keys=[_operations_key(job_id)], args=args)

    async def list(
        self, states: frozenset[int] = frozenset(), page_size: int = 100, page_token: str = ""
    ) -> tuple[list[job_pb2.Job], str]:
        """Return a page of jobs, newest first, and the token of the next page (empty: none). Raises BadPageToken.

        The token names the last job of the page, so that jobs submitted in between do not shift pages.
        """
        position = 0
        if page_token:
            rank = await self._redis.zrevrank(_JOBS, page_token)
            if rank is None:
                raise BadPageToken(page_token)
            position = rank + 1
        jobs: list[job_pb2.Job] = []
        while True:
            ids = [i.decode() for i in await self._redis.zrevrange(_JOBS, position, position + page_size - 1)]
            if not ids:
                return jobs, ""
            records = await self._redis.mget([_job_key(job_id) for job_id in ids])
            for job in map(read_record, ids, records):
                position += 1
                if states and job.state not in states:
                    continue
                jobs.append(job)
                if len(jobs) == page_size:
                    more = position < await self._redis.zcard(_JOBS)
                    return jobs, job.job_id if more else ""

    async def add_event(self, event: job_pb2.JobEvent) -> None:
        """Append to the job's history; sets the event's time."""
        await self._write(event.job_id, b"", event)

    async def events(self, job_id: str, after_event_id: str, count: int) -> Sequence[job_pb2.JobEvent]:
        """Return at most `count` events after the given one (empty: from the beginning), oldest first."""
        minimum = f"({after_event_id}" if after_event_id else "-"
        entries = await self._redis.xrange(_events_key(job_id), minimum, "+", count)
        return [_event(entry_id, fields) for entry_id, fields in entries]

    async def newest_event_id(self, job_id: str, skip: int = 0) -> str:
        """Return the id of the job's last event, or of the one `skip` events before it; empty when there is none."""
        newest = await self._redis.xrevrange(_events_key(job_id), count=skip + 1)
        return newest[skip][0].decode() if len(newest) > skip else ""

    async def watch(self, job_id: str, after_event_id: str) -> AsyncIterator[job_pb2.JobEvent]:
        """Yield events after the given one, then new ones, until the job has ended and all were read."""
        cursor = after_event_id or "0-0"
        while True:
            ended = (await self.get(job_id)).state in ENDED
            block = None if ended else _WATCH_BLOCK_MS
            reply = await self._redis.xread({_events_key(job_id): cursor}, count=500, block=block)
            if not reply and ended:
                return
            for _, entries in reply:
                for entry_id, fields in entries:
                    event = _event(entry_id, fields)
                    cursor = event.event_id
                    yield event


def _run_dir(job: job_pb2.Job) -> str:
    """Absolute path of the job's run folder, without links; empty when the record names none."""
    run_dir = json.loads(job.config_json).get("run_dir")
    return os.path.realpath(run_dir) if isinstance(run_dir, str) and run_dir and "\0" not in run_dir else ""


def check_event_id(after_event_id: str) -> None:
    """Raise BadRequestError for a text, unless empty, that cannot be the id of an event."""
    if after_event_id and re.fullmatch(r"\d{1,19}-\d{1,19}", after_event_id) is None:
        raise BadRequestError(f"after_event_id {after_event_id!r} is not one this service gave")


def _event(entry_id: bytes, fields: dict[bytes, bytes]) -> job_pb2.JobEvent:
    event = job_pb2.JobEvent.FromString(fields[b"event"])
    event.event_id = entry_id.decode()
    return event


def new_job(config: dict[str, object], num_rollout: int, submitted_by: str = "") -> job_pb2.Job:
    """Make a job record for a validated configuration."""
    # The id goes into keys, file names and addresses, which a name need not fit.
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", str(config.get("name") or "")).strip(".-")[:64] or "job"
    return job_pb2.Job(
        job_id=f"{readable}-{uuid.uuid4().hex[:8]}",
        name=str(config.get("name") or ""),
        state=job_pb2.JOB_STATE_QUEUED,
        config_json=json.dumps(config),
        num_rollout=num_rollout,
        submitted_unix_ns=time.time_ns(),
        submitted_by=submitted_by,
    )
