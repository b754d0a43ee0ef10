"""The consumer of the group stream: an index of the entries it has read, with payloads until they are taken."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

from redis.exceptions import ResponseError

from miles.queue.blobs import fetch_blob, is_named
from miles.queue.errors import UnreadableGroups
from miles.queue.keys import CONSUMER_GROUP, JobKeys
from miles.queue.payload import decode_group
from miles.queue.scripts import BURY, CREATE_GROUP, READ

if TYPE_CHECKING:
    import redis.asyncio

    from miles.types import SampleGroup

log = logging.getLogger(__name__)

_READ_COUNT = 16
"""Entries per read, which bounds the size of an answer: an entry has up to 1 MiB."""
_SHORT_ENTRY = 64 << 10
"""Entries of up to this size on average are read joined, as many as _READ_BYTES hold; bigger ones cost more to copy."""
_READ_BYTES = 1 << 20
_MOST_JOINED = 128
_ARRIVING_S = 0.001
"""How long short entries that arrive one after the other are waited for, to be read together."""

_PENDING_PAGE = 1000
_RECOVER_EVERY_S = 5.0
_MAX_DEAD = 100
"""Dead letters that are kept; they include payloads and must not fill the server."""

Fields = dict[bytes, bytes]


@dataclasses.dataclass(slots=True)
class _Entry:
    entry_id: str
    fields: Fields | None
    """None once taken; the payload is then read from Redis again on demand."""
    blob: memoryview | None = None
    """The fetched payload, when it is stored outside the entry."""


class GroupConsumer:
    """Reads entries as one consumer of the group `trainer` and indexes them by group id."""

    def __init__(
        self, redis: redis.asyncio.Redis, keys: JobKeys, name: str, *, dead_after_s: float, blob_ttl_s: int
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._name = name
        self._dead_after_ms = int(dead_after_s * 1000)
        self._blob_ttl_s = blob_ttl_s
        self._bury_script = redis.register_script(BURY)
        self._create_group = redis.register_script(CREATE_GROUP)
        self._read_joined = redis.register_script(READ)
        self._mean_bytes = 0
        """Of the entries that were read last; 0 before."""
        self._ready = True
        """Whether entries may lie ready, so that there is no need to wait for one."""
        self._arriving = False
        """Whether the last read brought fewer than it asked for."""
        self._entries: dict[int, _Entry] = {}
        self._recovered_at: float | None = None

    def held(self, group_ids: AbstractSet[int]) -> list[int]:
        """Return those of the groups whose entries have been read, ascending."""
        return sorted(self._entries.keys() & group_ids)

    def forget(self, group_ids: Iterable[int]) -> None:
        """Remove acknowledged groups from the index."""
        for group_id in group_ids:
            self._entries.pop(group_id, None)

    def forget_all(self) -> None:
        """Clear the index."""
        self._entries.clear()
        self._recovered_at = None

    async def read(self, block_s: float) -> None:
        """Index new entries; wait up to `block_s` seconds for one.

        The first call, and later ones while nothing new arrives, also look for pending entries that are not indexed:
        those delivered to an earlier process of the same name or in a lost answer, and those of dead consumers.
        """
        now = asyncio.get_running_loop().time()
        try:
            if self._recovered_at is None:
                await self._create_group(keys=[self._keys.groups], args=[CONSUMER_GROUP])
                await self._recover()
                self._recovered_at = now
                block_s = 0.0
            if not await self._read_new(block_s) and now - self._recovered_at >= _RECOVER_EVERY_S:
                await self._recover()
                self._recovered_at = now
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            log.warning(
                "the consumer group of %s is missing (did Redis lose its data?); creating it again", self._keys.groups
            )
            self.forget_all()

    async def fetch(self, group_ids: Iterable[int]) -> None:
        """Fetch the blobs of `held` groups from Redis, all at once, for `take`."""
        entries = [self._entries[group_id] for group_id in group_ids]
        blobs = [entry for entry in entries if entry.fields is not None and b"blob" in entry.fields]
        if not blobs:
            return
        outcomes = await asyncio.gather(*map(self._fetch, blobs), return_exceptions=True)
        for error in outcomes:
            if error is not None:
                raise error

    async def take(self, group_id: int) -> tuple[str, SampleGroup] | None:
        """Return entry id and group of a `held` group; None when the entry was deleted from Redis.

        An entry that cannot be decoded is moved to the dead-letter stream, and UnreadableGroups is raised.
        """
        entry = self._entries[group_id]
        if entry.fields is None:
            found: Any = await self._redis.xrange(self._keys.groups, entry.entry_id, entry.entry_id)
            if not found:
                del self._entries[group_id]
                return None
            entry.fields = found[0][1]
        try:
            group = decode_group(await self._payload(entry))
            if group.group_id != group_id:
                raise ValueError(f"entry of group {group_id} holds group {group.group_id}")
        except ValueError as error:
            await self._bury(entry.entry_id, str(group_id), str(error))
            del self._entries[group_id]
            raise UnreadableGroups(
                f"the entry of group {group_id} cannot be decoded ({error}); it was moved to {self._keys.dead} "
                "and the group must be generated again",
                [group_id],
            ) from error
        entry.fields = entry.blob = None
        return entry.entry_id, group

    async def peek(self, entry_id: str) -> tuple[str, SampleGroup] | None:
        """Return entry id and group of any entry; None when it was deleted or cannot be decoded."""
        found: Any = await self._redis.xrange(self._keys.groups, entry_id, entry_id)
        if not found:
            return None
        try:
            return entry_id, decode_group(await self._payload(_Entry(entry_id, found[0][1])))
        except ValueError as error:
            log.warning("entry %s of %s cannot be read: %s", entry_id, self._keys.groups, error)
            return None

    async def _payload(self, entry: _Entry) -> bytes | memoryview:
        fields = entry.fields or {}
        if b"group" in fields:
            return fields[b"group"]
        if b"blob" not in fields:
            raise ValueError("the entry has neither a field `group` nor a field `blob`")
        if entry.blob is None:
            await self._fetch(entry)
        name = fields[b"blob"].decode()
        if entry.blob is None:
            raise ValueError(f"its blob {name} is gone (expired or deleted)")
        if not is_named(name, entry.blob):
            raise ValueError(f"its blob {name} has changed")
        return entry.blob

    async def _fetch(self, entry: _Entry) -> None:
        assert entry.fields is not None
        name = entry.fields[b"blob"].decode()
        entry.blob = await fetch_blob(self._redis, self._keys.blob_prefix, name, self._blob_ttl_s)

    async def _read_new(self, block_s: float) -> bool:
        """Index entries that lie ready, or else the first that come within `block_s` seconds; return if any did."""
        entries: list[tuple[bytes, Fields]] = []
        if self._ready and self._mean_bytes <= _SHORT_ENTRY:
            if self._arriving:
                await asyncio.sleep(min(block_s, _ARRIVING_S))
            asked = min(_MOST_JOINED, _READ_BYTES // self._mean_bytes) if self._mean_bytes else _READ_COUNT
            entries = _split(
                *await self._read_joined(keys=[self._keys.groups], args=[CONSUMER_GROUP, self._name, asked])
            )
        if not entries:
            asked = _READ_COUNT
            answer: Any = await self._redis.xreadgroup(
                CONSUMER_GROUP,
                self._name,
                {self._keys.groups: ">"},
                count=asked,
                block=max(1, int(block_s * 1000)),
            )
            entries = answer[0][1] if answer else []
        self._ready, self._arriving = bool(entries), len(entries) < asked
        if entries:
            self._mean_bytes = sum(len(value) for _, fields in entries for value in fields.values()) // len(entries) + 1
        await self._index(entries)
        return bool(entries)

    async def _recover(self) -> None:
        # Ids first: this consumer may have thousands of pending entries, nearly all of them indexed.
        known = {entry.entry_id for entry in self._entries.values()}
        start = "-"
        while True:
            pending: list[dict[str, Any]] = await self._redis.xpending_range(
                self._keys.groups, CONSUMER_GROUP, min=start, max="+", count=_PENDING_PAGE
            )
            mine = [item["message_id"] for item in pending if item["consumer"].decode() == self._name]
            orphans = [
                item["message_id"]
                for item in pending
                if item["consumer"].decode() != self._name and item["time_since_delivered"] >= self._dead_after_ms
            ]
            if orphans:
                # With the idle time: a consumer that has touched an entry since then keeps it.
                mine += await self._redis.xclaim(
                    *(self._keys.groups, CONSUMER_GROUP, self._name, self._dead_after_ms, orphans), justid=True
                )
            for entry_id in mine:
                if entry_id.decode() not in known:
                    await self._index_one(entry_id.decode())
            if len(pending) < _PENDING_PAGE:
                return
            start = f"({pending[-1]['message_id'].decode()}"

    async def _index_one(self, entry_id: str) -> None:
        found: Any = await self._redis.xrange(self._keys.groups, entry_id, entry_id)
        if found:
            await self._index(found)
        else:
            # Deleted while pending, by another client that died before it acknowledged the entry.
            await self._redis.xack(self._keys.groups, CONSUMER_GROUP, entry_id)

    async def _index(self, entries: list[tuple[bytes, Fields]]) -> None:
        for raw_id, fields in entries:
            entry_id = raw_id.decode()
            group_id = fields.get(b"group_id", b"")
            if group_id.isdigit():
                self._entries.setdefault(int(group_id), _Entry(entry_id, fields))
            else:
                log.error(
                    "entry %s of %s has no group_id; moving it to %s", entry_id, self._keys.groups, self._keys.dead
                )
                await self._bury(entry_id, "", f"field group_id: {group_id!r} is not a number")

    async def _bury(self, entry_id: str, group_id: str, reason: str) -> None:
        await self._bury_script(
            keys=[self._keys.groups, self._keys.index, self._keys.blob_refs, self._keys.dead],
            args=[CONSUMER_GROUP, self._keys.blob_prefix, entry_id, group_id, reason, _MAX_DEAD],
        )


def _split(sizes: bytes, values: bytes) -> list[tuple[bytes, Fields]]:
    """Return the entries that the script `READ` has joined."""
    entries = []
    end = 0
    for line in sizes.split(b";") if sizes else ():
        entry_id, *lengths = line.split(b" ")
        texts = []
        for length in lengths:
            begin, end = end, end + int(length)
            texts.append(values[begin:end])
        entries.append((entry_id, dict(zip(texts[::2], texts[1::2], strict=True))))
    return entries
