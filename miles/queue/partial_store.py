"""Store of half-finished groups, for the rollout that leases them next."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from miles.queue.backpressure import until_written
from miles.queue.blobs import PIECE_BYTES
from miles.queue.keys import JobKeys
from miles.queue.payload import decode_group, encode_group
from miles.queue.pipelining import Pipeliner
from miles.queue.scripts import SAVE_PARTIAL

if TYPE_CHECKING:
    import redis.asyncio

    from miles.types import Sample, SampleGroup

PARTIAL_TTL_S = 30 * 24 * 3600
"""How long a half-finished group is kept, in seconds; after that the group starts over, which is correct but slower."""

_SAMPLE = "sample:"
"""What the field of a sample begins with; its index follows."""
_WHOLE = b"group"
"""The field of all samples, in which earlier versions stored them."""


class PartialStore:
    """Groups of which some samples are unfinished (tokens, log-probs, experts and versions so far)."""

    def __init__(self, redis: redis.asyncio.Redis, job_id: str, *, ttl_s: int = PARTIAL_TTL_S) -> None:
        self._redis = redis
        self._keys = JobKeys(job_id)
        self._ttl_s = ttl_s
        self._pipeliner = Pipeliner(redis)
        self._save = redis.register_script(SAVE_PARTIAL)

    async def save(
        self,
        group_id: int,
        group: SampleGroup,
        *,
        attempt: int = 0,
        changed: Collection[int] | None = None,
        deadline_s: float = 60.0,
    ) -> bool:
        """Store a group; it replaces one of the same or an earlier attempt.

        `changed` are the indices of the samples that differ from what this attempt has stored, so that the others,
        which may have megabytes of routed experts, are not sent again; None for all. Large samples are written one by
        one: killed in between, a later attempt finds those that were. Returns False when a later
        attempt has stored a group, which is kept. Waits while Redis is out of memory or unreachable, and raises
        QueueFull or the connection's error after `deadline_s` seconds.
        """
        sent = [sample for sample in group.samples if changed is None or sample.index in changed]
        which = "all" if changed is None else "some"
        for batch in _batches(sent):
            state = await self._save_batch(group, batch, which, attempt, deadline_s)
            if state == b"incomplete":  # what was stored has expired or was deleted
                return await self.save(group_id, group, attempt=attempt, deadline_s=deadline_s)
            if state == b"later":
                return False
            which = "some"
        return True

    async def _save_batch(
        self, group: SampleGroup, samples: Sequence[Sample], which: str, attempt: int, deadline_s: float
    ) -> bytes:
        from miles.types import SampleGroup

        arguments: list[str | int | bytes] = [attempt, self._ttl_s, which]
        nbytes = 0
        for sample in samples:
            payload = encode_group(SampleGroup(group.job_id, group.group_id, [sample]))
            arguments += [f"{_SAMPLE}{sample.index}", payload]
            nbytes += len(payload)

        async def write() -> bytes:
            state: bytes = await self._save(keys=[self._keys.partial(group.group_id)], args=arguments)
            return state

        return await until_written(write, f"partial group {group.group_id}", nbytes, deadline_s)

    async def load(self, group_id: int) -> SampleGroup | None:
        """Return the stored group, or None. Raises ValueError when it cannot be decoded."""
        from miles.types import SampleGroup

        [fields] = await self._pipeliner.run([("HGETALL", self._keys.partial(group_id))], 0)
        payloads = [fields[name] for name in fields if name == _WHOLE or name.startswith(_SAMPLE.encode())]
        if not payloads:
            return None
        groups = [decode_group(payload) for payload in payloads]
        samples = sorted((sample for group in groups for sample in group.samples), key=lambda sample: sample.index)
        return SampleGroup(groups[0].job_id, groups[0].group_id, samples)

    async def delete(self, group_id: int) -> None:
        """Delete a group; do nothing when there is none."""
        await self._redis.unlink(self._keys.partial(group_id))


def _batches(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Cut samples so that a write has about as many bytes as a piece of a blob; an empty batch when there are none."""
    batch: list[Sample] = []
    nbytes = 0
    for sample in samples:
        experts = sample.rollout_routed_experts
        size = sample.tokens.nbytes + (0 if experts is None else experts.nbytes)
        if batch and nbytes + size > PIECE_BYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append(sample)
        nbytes += size
    yield batch
