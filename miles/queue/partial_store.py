"""Store of half-finished groups, for the rollout that leases them next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles.queue.backpressure import until_written
from miles.queue.keys import JobKeys
from miles.queue.payload import decode_group, encode_group
from miles.queue.pipelining import Pipeliner
from miles.queue.scripts import SAVE_PARTIAL

if TYPE_CHECKING:
    import redis.asyncio

    from miles.types import SampleGroup

PARTIAL_TTL_S = 30 * 24 * 3600
"""How long a half-finished group is kept, in seconds; after that the group starts over, which is correct but slower."""


class PartialStore:
    """Groups of which some samples are unfinished (tokens, log-probs, experts and versions so far)."""

    def __init__(self, redis: redis.asyncio.Redis, job_id: str, *, ttl_s: int = PARTIAL_TTL_S) -> None:
        self._redis = redis
        self._keys = JobKeys(job_id)
        self._ttl_s = ttl_s
        self._pipeliner = Pipeliner(redis)
        self._save = redis.register_script(SAVE_PARTIAL)

    async def save(self, group_id: int, group: SampleGroup, *, attempt: int = 0, deadline_s: float = 60.0) -> bool:
        """Store a group; it replaces one of the same or an earlier attempt.

        Returns False when a later attempt has stored one, which is kept. Waits while Redis is out of memory or
        unreachable, and raises QueueFull or the connection's error after `deadline_s` seconds.
        """
        payload = encode_group(group)

        async def write() -> int:
            return int(await self._save(keys=[self._keys.partial(group_id)], args=[attempt, payload, self._ttl_s]))

        return bool(await until_written(write, f"partial group {group_id}", len(payload), deadline_s))

    async def load(self, group_id: int) -> SampleGroup | None:
        """Return the stored group, or None. Raises ValueError when it cannot be decoded."""
        payload = await self._pipeliner.hget(self._keys.partial(group_id), "group")
        return None if payload is None else decode_group(payload)

    async def delete(self, group_id: int) -> None:
        """Delete a group; do nothing when there is none."""
        await self._redis.unlink(self._keys.partial(group_id))
