"""A version made ready for servers: in buckets, where each of them reads best.

tensors in one allocation of a GPU    one bucket, which is not copied
tensors in host memory                buckets in the memory of the server's GPU, while there is room for them;
                                      from there a server copies in milliseconds
and for other servers                 buckets in shared memory
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch

from miles.services.rollout.engines.sglang.weights.bucket_line import BucketLine, BucketReader
from miles.services.rollout.engines.sglang.weights.buckets import (
    Bucket,
    NamedTensor,
    are_together,
    flatten,
    in_buckets,
)
from miles.services.rollout.engines.sglang.weights.gpu_buckets import GpuBuckets

_AT_ONCE = 2
"""Buckets in shared memory at the same time: one is read while the next is made."""


class StagedWeights:
    """The buckets of one version for each place where servers read them."""

    def __init__(self, tensors: Sequence[NamedTensor], bucket_bytes: int, on_gpu: GpuBuckets) -> None:
        self._tensors = tensors
        self._bucket_bytes = bucket_bytes
        self._on_gpu = on_gpu
        self._on_host = not any(tensor.is_cuda for _, tensor in tensors)
        self.parts: Sequence[Sequence[NamedTensor]] = (
            [tensors] if are_together(tensors) else list(in_buckets(tensors, bucket_bytes))
        )
        """The tensors of each bucket in shared memory, or in place."""
        self.copied_on_gpu = False
        """Whether a bucket is a copy in GPU memory, which must outlive what servers have started to read."""
        self._lines: dict[torch.device | None, BucketLine] = {}
        """By the GPU of the servers that read them; several may have the same line."""

    async def stage(self, gpus: Sequence[torch.device | None]) -> None:
        """Make as many buckets as there is room for, for servers that have these GPUs; None: buckets in host memory."""
        lines = [await self._line(gpu) for gpu in gpus]
        await asyncio.gather(*(line.made_ahead() for line in lines))

    async def join(self, gpus: Sequence[torch.device | None]) -> list[BucketReader]:
        """A reader for each of the servers, which have these GPUs."""
        lines = [await self._line(gpu) for gpu in gpus]
        return [line.join() for line in lines]

    async def close(self) -> None:
        """Free all buckets, and the memory on GPUs that they were in."""
        await asyncio.gather(*(line.close() for line in self._lines.values()))
        self._lines.clear()
        if self.copied_on_gpu:
            await asyncio.to_thread(self._on_gpu.free_memory)

    async def _line(self, gpu: torch.device | None) -> BucketLine:
        if gpu in self._lines:
            return self._lines[gpu]
        plan = None
        if gpu is not None and self._on_host:
            plan = await asyncio.to_thread(self._on_gpu.plan, self._tensors, self._bucket_bytes, gpu)
        if plan is not None:
            line = BucketLine(plan.parts, lambda part: self._make(part, gpu), plan.room_bytes)
        elif gpu is not None:
            line = await self._line(None)
        else:
            line = BucketLine(self.parts, lambda part: self._make(part, None), _AT_ONCE * self._bucket_bytes)
        self._lines[gpu] = line
        return line

    def _make(self, part: Sequence[NamedTensor], gpu: torch.device | None) -> Bucket:
        made = flatten(part) if gpu is None else self._on_gpu.make(part, gpu)
        self.copied_on_gpu |= made.flat.is_cuda and not made.in_place
        return made
