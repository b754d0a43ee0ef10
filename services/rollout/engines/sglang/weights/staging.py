"""Buckets made once and read by several servers, each at its own pace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from miles.services.rollout.engines.sglang.weights.buckets import Bucket, NamedTensor, flatten


class StagedWeights:
    """A version's buckets: each is flattened when the first server needs it, and freed once all have read it.

    On a GPU nothing is freed before `StagedWeights` itself: a server's answer only means that its copies were started.
    """

    def __init__(self, parts: Sequence[Sequence[NamedTensor]], readers: int) -> None:
        self._parts = parts
        self._readers = readers
        self._made: dict[int, Bucket] = {}
        self._read: dict[int, int] = {}
        self._lock = asyncio.Lock()

    async def buckets(self) -> AsyncIterator[tuple[Bucket, bool]]:
        """One server's pass over all buckets, each with whether it is the last."""
        for i in range(len(self._parts)):
            async with self._lock:
                if i not in self._made:
                    self._made[i] = await asyncio.to_thread(flatten, self._parts[i])
            yield self._made[i], i == len(self._parts) - 1
            self._read[i] = self._read.get(i, 0) + 1
            if self._read[i] == self._readers and not self._made[i].flat.is_cuda:
                del self._made[i]
