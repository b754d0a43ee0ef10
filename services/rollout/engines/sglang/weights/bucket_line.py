"""Buckets made one after the other, ahead of the servers that read them, each at its own pace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from miles.change_signal import ChangeSignal
from miles.services.rollout.engines.sglang.weights.buckets import Bucket, NamedTensor
from miles.tasks import cancel

Make = Callable[[Sequence[NamedTensor]], Bucket]
"""Makes a bucket of tensors; called on another thread, one call at a time."""


class BucketLine:
    """Makes buckets as long as there is room for them, and frees one when every reader has read it.

    There is always room for one. All readers join before the first of them reads.
    """

    def __init__(self, parts: Sequence[Sequence[NamedTensor]], make: Make, room_bytes: int) -> None:
        """`parts`: the tensors of each bucket; `room_bytes`: for all buckets that exist at the same time."""
        self._sizes = [sum(tensor.nbytes for _, tensor in part) for part in parts]
        self._room_bytes = room_bytes
        self._made: dict[int, Bucket] = {}
        """By position; the read ones are gone."""
        self._readers: set[BucketReader] = set()
        self._rests = False
        """Whether no more can be made until one is read, or ever."""
        self._error: Exception | None = None
        self._changed = ChangeSignal()
        self._producer = asyncio.create_task(self._produce(parts, make))

    async def made_ahead(self) -> None:
        """Return when no more can be made before a bucket is read; raise what prevents it."""
        while not self._rests:
            await self._changed.wait()
        if self._error is not None:
            raise self._error

    def join(self) -> BucketReader:
        """A new reader, for which every bucket is kept until it has read it or leaves."""
        reader = BucketReader(self)
        self._readers.add(reader)
        return reader

    async def close(self) -> None:
        """Make no more, and free all."""
        await cancel(self._producer)
        self._made.clear()

    def count(self) -> int:
        """Buckets in all."""
        return len(self._sizes)

    async def get(self, number: int) -> Bucket:
        """A bucket, once it is made; raises what prevents it."""
        while number not in self._made:
            if self._error is not None:
                raise self._error
            await self._changed.wait()
        return self._made[number]

    def leave(self, reader: BucketReader) -> None:
        """Keep nothing for this reader any more, and make nothing when it was the last one."""
        self._readers.discard(reader)
        if not self._readers:
            self._producer.cancel()
        self.free_read()

    def free_read(self) -> None:
        """Free what all readers have read."""
        begin = min((reader.position for reader in self._readers), default=self.count())
        for number in [number for number in self._made if number < begin]:
            del self._made[number]
        self._changed.notify()

    async def _produce(self, parts: Sequence[Sequence[NamedTensor]], make: Make) -> None:
        try:
            for number, part in enumerate(parts):
                while self._made and self._nbytes() + self._sizes[number] > self._room_bytes:
                    self._note(rests=True)
                    await self._changed.wait()
                self._note(rests=False)
                self._made[number] = await asyncio.to_thread(make, part)
        except Exception as error:  # whoever waits for the bucket raises it
            self._error = error
        self._note(rests=True)

    def _nbytes(self) -> int:
        return sum(self._sizes[number] for number in self._made)

    def _note(self, *, rests: bool) -> None:
        self._rests = rests
        self._changed.notify()


class BucketReader:
    """One server's pass over all buckets; a context manager, at the end of which nothing is kept for it any more."""

    def __init__(self, line: BucketLine) -> None:
        self._line = line
        self.position = 0
        """Of the bucket that it reads now."""

    def __enter__(self) -> BucketReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._line.leave(self)

    async def buckets(self) -> AsyncIterator[tuple[Bucket, bool]]:
        """Each bucket, and whether it is the last."""
        for number in range(self._line.count()):
            yield await self._line.get(number), number == self._line.count() - 1
            self.position = number + 1
            self._line.free_read()
