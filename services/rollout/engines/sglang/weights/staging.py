"""Buckets made once and read by several servers, each at its own pace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from miles.services.rollout.engines.sglang.weights.buckets import (
    Bucket,
    NamedTensor,
    are_together,
    flatten,
    in_buckets,
)


class StagedWeights:
    """A version's buckets: each is flattened when the first server needs it, and freed once all have read it.

    Tensors in one allocation of a GPU are one bucket, which is not copied. On a GPU nothing is freed before
    `StagedWeights` itself: a server's answer only means that its copies were started.
    """

    def __init__(self, tensors: Sequence[NamedTensor], bucket_bytes: int) -> None:
        self.parts: Sequence[Sequence[NamedTensor]] = (
            [tensors] if are_together(tensors) else list(in_buckets(tensors, bucket_bytes))
        )
        """The tensors of each bucket."""
        self.copied_on_gpu = False
        """Whether a bucket is a copy in GPU memory, which must outlive what servers have started to read."""
        self._made: dict[int, Bucket] = {}
        self._read: dict[int, int] = {}
        self._lock = asyncio.Lock()

    async def stage(self) -> None:
        """Make the first bucket, which often is the only one."""
        await self._bucket(0)

    async def buckets(self, readers: int) -> AsyncIterator[tuple[Bucket, bool]]:
        """One server's pass over all buckets, each with whether it is the last; `readers` servers make one."""
        for i in range(len(self.parts)):
            bucket = await self._bucket(i)
            yield bucket, i == len(self.parts) - 1
            self._read[i] = self._read.get(i, 0) + 1
            if self._read[i] == readers and not bucket.flat.is_cuda:
                del self._made[i]

    async def _bucket(self, i: int) -> Bucket:
        async with self._lock:
            if i not in self._made:
                made = self._made[i] = await asyncio.to_thread(flatten, self.parts[i])
                self.copied_on_gpu |= made.flat.is_cuda and not made.in_place
            return self._made[i]
