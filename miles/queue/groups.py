"""The stream of finished groups from rollouts to the trainer: at-least-once delivery, idempotent per group id."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from redis.exceptions import NoScriptError, ResponseError

from miles.queue.backpressure import TRANSIENT, WriteWait, is_out_of_memory, until_written
from miles.queue.blobs import PIECE_BYTES, blob_name, piece_keys, pieces
from miles.queue.consumer import GroupConsumer
from miles.queue.errors import MissingGroups
from miles.queue.fencing import FENCE, Fenced, Holder, stamp
from miles.queue.keys import CONSUMER_GROUP, JobKeys
from miles.queue.payload import INLINE_LIMIT, Outstanding, encode_group
from miles.queue.pipelining import Call, Command, Pipeliner
from miles.queue.scripts import ACKNOWLEDGE, BEGIN_LIFE, DROP, PUT, REOPEN
from miles.telemetry.tracing import traced

if TYPE_CHECKING:
    import redis.asyncio

    from miles.types import SampleGroup

log = logging.getLogger(__name__)
_T = TypeVar("_T")

BLOB_TTL_S = 30 * 24 * 3600
"""How long a blob is kept after its entry was last put or read, in seconds; bounds the memory of forgotten jobs."""

_UPLOAD_TTL_S = 3600
"""How long a blob is kept before an entry refers to it, in seconds, in case its producer dies in between."""

_NO_LEASE = 1 << 53
"""Above every lease number."""

_CONCURRENT_FETCHES = 4
"""Blobs that are fetched at the same time: one is parsed while the others arrive."""

_ACKNOWLEDGE_BATCH = 256
"""Groups acknowledged by one script call, which blocks Redis."""


class GroupQueue:
    """One job's finished groups.

    Rollouts `put`, the trainer `collect`s and, once a checkpoint covers them, `acknowledge`s; the controller reads
    `outstanding`. A group is in the queue at most once, however often it is put.
    """

    def __init__(
        self,
        redis: redis.asyncio.Redis,
        job_id: str,
        *,
        consumer: str = "trainer",
        dead_after_s: float = 60.0,
        inline_limit: int = INLINE_LIMIT,
        blob_ttl_s: int = BLOB_TTL_S,
    ) -> None:
        """`consumer` names the reader. A restarted reader with the same name gets its own pending entries at once, and
        those of other names once they have been idle for `dead_after_s` seconds. Payloads above `inline_limit` bytes
        become blobs, which are kept `blob_ttl_s` seconds after their last use."""
        self._redis = redis
        self._keys = JobKeys(job_id)
        self._inline_limit = inline_limit
        self._blob_ttl_s = blob_ttl_s
        self._put = redis.register_script(PUT)
        self._pipeliner = Pipeliner(redis)
        self._drop = redis.register_script(DROP)
        self._fence = redis.register_script(FENCE)
        self._begin_life = redis.register_script(BEGIN_LIFE)
        self._reopen = redis.register_script(REOPEN)
        self._acknowledge = redis.register_script(ACKNOWLEDGE)
        self.waiting: dict[str, WriteWait] = {}
        """Groups that Redis does not take now, and drops of groups, by what they are."""
        self._consumer = GroupConsumer(redis, self._keys, consumer, dead_after_s=dead_after_s, blob_ttl_s=blob_ttl_s)

    @traced("put group")
    async def put(
        self,
        group: SampleGroup,
        *,
        attempt: int,
        oldest_version: int | None = None,
        holder: Holder | None = None,
        deadline_s: float = 600.0,
    ) -> str:
        """Queue a group and return its entry's id; a group that is already queued keeps its first entry.

        `oldest_version` is read from the samples when not given. Waits while Redis is out of memory or
        unreachable, and raises QueueFull or the connection's error after `deadline_s` seconds. Raises Fenced, and
        queues nothing, when `holder`'s lease has ended.
        """
        payload = encode_group(group)
        oldest = (group.oldest_version or 0) if oldest_version is None else oldest_version
        commands = self._put_commands(group.group_id, f"{attempt} {oldest} {len(payload)}", payload, holder)

        async def write() -> str:
            while True:
                state, _, entry_id = (await self._send_put(commands, len(payload))).partition(b" ")
                if state == b"fenced":
                    raise Fenced(group.group_id, holder)
                if state != b"no-blob":
                    return entry_id.decode()

        return await until_written(write, f"group {group.group_id}", len(payload), deadline_s, self.waiting)

    async def _send_put(self, commands: list[Command], nbytes: int) -> bytes:
        """Send the commands, of which PUT is the last, and return what PUT returns."""
        while True:
            try:
                for command in commands[:-2]:  # pieces of a blob, one at a time
                    await self._pipeliner.run([command], PIECE_BYTES)
                answer: bytes = (await self._pipeliner.run(commands[-2:], nbytes))[-1]
                return answer
            except NoScriptError:
                await self._redis.script_load(PUT)
            except ResponseError as error:
                if len(commands) == 1 or not is_out_of_memory(error):
                    raise
                # There is no room for the blob; none is needed if the group is queued or the lease has ended.
                answer = await self._send_put(commands[-1:], 0)
                if answer == b"no-blob":
                    raise
                return answer

    def _put_commands(self, group_id: int, numbers: str, payload: bytes, holder: Holder | None) -> list[Command]:
        arguments = (*stamp(holder), group_id, numbers)
        keys: tuple[str, ...] = (self._keys.groups, self._keys.index, self._keys.fences)
        if len(payload) <= self._inline_limit:
            return [Call(("EVALSHA", self._put.sha, len(keys), *keys), (*arguments, payload))]
        name = blob_name(payload)
        blob_keys = piece_keys(self._keys.blob_prefix, name)
        keys += (self._keys.blob_refs, blob_keys[0])
        return [
            # NX: an existing blob has an entry, and must keep its longer time to live.
            *(
                ("SET", key, piece, "EX", _UPLOAD_TTL_S, "NX")
                for key, piece in zip(blob_keys, pieces(payload, len(blob_keys)), strict=True)
            ),
            Call(("EVALSHA", self._put.sha, len(keys), *keys), (*arguments, name, self._blob_ttl_s)),
        ]

    async def drop(
        self, group_id: int, reason: str, *, holder: Holder | None = None, deadline_s: float = 600.0
    ) -> bool:
        """Record that a group was dropped for good, until `acknowledge`; return False when it is queued already.

        Waits and raises as `put` does.
        """

        async def write() -> bytes:
            answer: bytes = await self._drop(
                keys=[self._keys.index, self._keys.dropped, self._keys.fences],
                args=[group_id, reason, *stamp(holder)],
            )
            return answer

        state = await until_written(write, f"the drop of group {group_id}", 0, deadline_s, self.waiting)
        if state == b"fenced":
            raise Fenced(group_id, holder)
        return state == b"dropped"

    async def dropped(self) -> dict[int, str]:
        """Return the groups that were dropped and not acknowledged, with the reasons."""
        records: Any = await self._redis.hgetall(self._keys.dropped)
        return {int(group_id): reason.decode(errors="replace") for group_id, reason in records.items()}

    async def why_dropped(self, group_id: int) -> str | None:
        """Return the reason why a group was dropped; None when it was not."""
        reason = await self._pipeliner.hget(self._keys.dropped, str(group_id))
        return None if reason is None else reason.decode(errors="replace")

    async def fence(self, worker_id: str, lease_number: int, *, deadline_s: float = 60.0) -> None:
        """`fence_all` of one worker."""
        await self.fence_all({worker_id: lease_number}, deadline_s=deadline_s)

    async def fence_all(self, lease_numbers: Mapping[str, int], *, deadline_s: float = 60.0) -> None:
        """Refuse results of each worker's leases (`*`: of all workers') with smaller numbers than its one here.

        While Redis is unreachable, waits up to `deadline_s` seconds before it raises the connection's error.
        """
        arguments = [part for pair in lease_numbers.items() for part in pair]

        async def write() -> None:
            await self._fence(keys=[self._keys.fences], args=arguments)

        names = list(lease_numbers)
        what = f"the fence of {names[0]}" if len(names) == 1 else f"the fences of {len(names)} workers"
        await until_written(write, what, 0, deadline_s)

    async def wait_until_answering(self, deadline_s: float) -> None:
        """Return once Redis answers; after `deadline_s` seconds raises the connection's error."""
        await until_written(self._redis.ping, "a ping", 0, deadline_s)

    async def begin_life(self) -> int:
        """Count another controller process that takes up the job; return how many there were, from 1."""
        return int(await self._begin_life(keys=self._keys.lasting))

    async def retire(self) -> None:
        """Keep what is queued of a job that has ended only as long as its blobs, unless another life begins."""
        await until_written(self._expire_lasting, f"the time to live of job {self._keys.job_id}", 0, 60.0)

    async def _expire_lasting(self) -> None:
        for key in self._keys.lasting:
            await self._redis.expire(key, self._blob_ttl_s)

    @traced("collect groups")
    async def collect(self, group_ids: Iterable[int], deadline_s: float) -> dict[int, tuple[str, SampleGroup]]:
        """Wait until all these groups are queued; return (entry id, group) by group id, in the order asked for.

        Entries stay pending until `acknowledge`, so a group can be collected again. Groups that were read but not
        asked for are kept for later calls. Raises MissingGroups after `deadline_s` seconds, and UnreadableGroups at
        once when an entry cannot be decoded.
        """
        wanted = list(dict.fromkeys(group_ids))
        loop = asyncio.get_running_loop()
        deadline = loop.time() + deadline_s
        collected: dict[int, tuple[str, SampleGroup]] = {}
        missing = set(wanted)
        outage = ""
        while True:
            left_s = deadline - loop.time()
            try:
                if await self._take_held(missing, collected):
                    return {group_id: collected[group_id] for group_id in wanted}
                await self._consumer.read(max(0.0, min(left_s, 1.0)))
                if left_s > 0 or await self._take_held(missing, collected):
                    continue
            except TRANSIENT as error:
                # Redis restarts, and has all unacknowledged entries afterwards.
                outage = f"; Redis was unreachable: {error}"
                log.warning("collecting groups of job %s: %s", self._keys.job_id, error)
                await asyncio.sleep(max(0.0, min(left_s, 1.0)))
                if left_s > 0:
                    continue
            still_missing = [group_id for group_id in wanted if group_id in missing]
            raise MissingGroups(
                f"groups {_abbreviate(still_missing)} of job {self._keys.job_id} did not appear in the queue within "
                f"{deadline_s:.0f} s ({len(collected)} of {len(wanted)} did){outage}",
                still_missing,
            )

    async def _take_held(self, missing: set[int], collected: dict[int, tuple[str, SampleGroup]]) -> bool:
        """Move groups whose entries were read from `missing` to `collected`; return whether none is missing."""
        for batch in _batches(self._consumer.held(missing), _CONCURRENT_FETCHES):
            await self._consumer.fetch(batch)
            for group_id in batch:
                taken = await self._consumer.take(group_id)
                if taken is not None:
                    collected[group_id] = taken
                    missing.remove(group_id)
        return not missing

    async def acknowledge(self, ids: Iterable[int | str], *, deadline_s: float = 60.0) -> int:
        """Delete groups for good: entry, payload and index record, or the record that they were dropped.

        Returns how many were still queued. `ids` are group ids (int) or entry ids (str, as returned by `put` and
        `collect`). While Redis is unreachable, waits up to `deadline_s` seconds, then raises the connection's error.
        """
        pairs = await self._resolve(list(ids))
        removed = 0
        for batch in _batches(pairs, _ACKNOWLEDGE_BATCH):
            removed += await until_written(
                functools.partial(self._acknowledge_batch, batch),
                f"the acknowledgement of {len(batch)} groups",
                0,
                deadline_s,
            )
            self._consumer.forget(group_id for group_id, _ in batch)
        return removed

    async def _acknowledge_batch(self, pairs: list[tuple[int, str]]) -> int:
        return int(
            await self._acknowledge(
                keys=[self._keys.groups, self._keys.index, self._keys.blob_refs, self._keys.dropped],
                args=[CONSUMER_GROUP, self._keys.blob_prefix, *(item for pair in pairs for item in pair)],
            )
        )

    async def outstanding(self) -> list[Outstanding]:
        """Return every unacknowledged entry, without its payload, by ascending group id."""
        records: Any = await self._redis.hgetall(self._keys.index)
        return sorted(
            (Outstanding.parse(group_id, record) for group_id, record in records.items()), key=lambda o: o.group_id
        )

    async def find(self, group_id: int) -> tuple[str, SampleGroup] | None:
        """Return entry id and group of a queued group without consuming it; None when not queued or unreadable."""
        record = await self._pipeliner.hget(self._keys.index, str(group_id))
        return None if record is None else await self._consumer.peek(record.split(b" ", 1)[0].decode())

    async def dead_letters(self, limit: int = 100) -> list[dict[str, bytes]]:
        """Return the newest undecodable entries, newest first, with `dead_reason`, `dead_group_id`, ..."""
        entries: Any = await self._redis.xrevrange(self._keys.dead, count=limit)
        return [{name.decode(errors="replace"): value for name, value in fields.items()} for _, fields in entries]

    async def drop_job(self) -> None:
        """Delete everything of the job, also partial trajectories, dead letters and drafts, and refuse new entries."""
        keys = self._keys
        # First the fence, which outlives the job: a worker that resumes later must not queue anything.
        await self.fence("*", _NO_LEASE)
        await self._redis.expire(keys.fences, BLOB_TTL_S)
        await self._redis.unlink(*(key for key in keys.lasting if key != keys.fences))
        await self._unlink_all(keys.blob_prefix)
        await self._unlink_all(keys.partial_prefix)
        await self._redis.unlink(keys.response_ages, keys.response_sizes)
        await self._unlink_all(keys.responses_prefix)
        self._consumer.forget_all()

    async def reopen(self, lease_number: int) -> None:
        """Take entries again, from worker leases of this number on, if the job was dropped: it begins once more."""
        await self._reopen(keys=[self._keys.fences], args=[_NO_LEASE, lease_number])

    async def forget_partials(self) -> None:
        """Delete the job's partial trajectories: their groups begin afresh."""
        await self._unlink_all(self._keys.partial_prefix)

    async def _unlink_all(self, prefix: str) -> None:
        batch: list[Any] = []
        async for key in self._redis.scan_iter(match=f"{prefix}*", count=1000):
            batch.append(key)
            if len(batch) == 1000:
                await self._redis.unlink(*batch)
                batch.clear()
        if batch:
            await self._redis.unlink(*batch)

    async def _resolve(self, ids: list[int | str]) -> list[tuple[int, str]]:
        """Return pairs (group id, entry id or '') for the acknowledge script, without entries that no longer exist."""
        entries = [entry_id for entry_id in ids if isinstance(entry_id, str)]
        known = {entry.entry_id: entry.group_id for entry in await self.outstanding()} if entries else {}
        pairs = [(group_id, "") for group_id in ids if isinstance(group_id, int)]
        return pairs + [(known[entry_id], entry_id) for entry_id in entries if entry_id in known]


def _batches(items: list[_T], size: int) -> Iterator[list[_T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _abbreviate(group_ids: list[int], limit: int = 20) -> str:
    shown = ", ".join(str(group_id) for group_id in group_ids[:limit])
    return shown if len(group_ids) <= limit else f"{shown} and {len(group_ids) - limit} more"
