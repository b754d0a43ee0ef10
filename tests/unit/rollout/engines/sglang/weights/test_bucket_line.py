"""Lines of buckets: what is made ahead, when a bucket is freed, and who hears of an error."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence

import pytest
import torch

from miles.services.rollout.engines.sglang.weights.bucket_line import BucketLine
from miles.services.rollout.engines.sglang.weights.buckets import Bucket, NamedTensor

PARTS = [[(str(number), torch.full((10,), number, dtype=torch.uint8))] for number in range(6)]


class Maker:
    """Makes buckets, and knows which are made and not freed."""

    def __init__(self, failing: str = "") -> None:
        self.made: list[str] = []
        self.held = threading.Event()
        self.held.set()
        self._failing = failing

    def __call__(self, part: Sequence[NamedTensor]) -> Bucket:
        self.held.wait()
        ((name, tensor),) = part
        if name == self._failing:
            raise OSError(f"no room for {name}")
        self.made.append(name)
        return Bucket(tensor, [], in_place=True)


async def read(buckets: AsyncIterator[tuple[Bucket, bool]], count: int = len(PARTS)) -> list[int]:
    """The next buckets, by what is in them."""
    found = []
    for _ in range(count):
        bucket, last = await anext(buckets)
        found.append(int(bucket.flat[0]))
        assert last == (found[-1] == len(PARTS) - 1)
    return found


@pytest.mark.parametrize(("room", "ahead"), [(0, 1), (10, 1), (29, 2), (30, 3), (1000, 6)])
async def test_as_many_buckets_are_made_ahead_as_there_is_room_for(room: int, ahead: int) -> None:
    maker = Maker()
    line = BucketLine(PARTS, maker, room)
    await line.made_ahead()
    assert len(maker.made) == ahead
    with line.join() as reader:
        assert await read(reader.buckets()) == list(range(6))
    await line.close()


async def test_a_bucket_is_kept_until_the_slowest_reader_has_read_it() -> None:
    maker = Maker()
    line = BucketLine(PARTS, maker, 20)
    fast, slow = line.join(), line.join()
    rapid, tardy = fast.buckets(), slow.buckets()
    assert await read(rapid, 2) == [0, 1]
    waiting = asyncio.create_task(read(rapid, 4))
    await line.made_ahead()
    assert maker.made == ["0", "1"], "the slow one has not begun"
    assert await read(tardy, 6) == list(range(6))
    assert await waiting == [2, 3, 4, 5]
    await line.close()


async def test_a_reader_that_leaves_holds_nobody_up() -> None:
    line = BucketLine(PARTS, Maker(), 10)
    readers = [line.join(), line.join()]
    with readers[0]:
        others = asyncio.create_task(read(readers[1].buckets()))
        assert await read(readers[0].buckets(), 1) == [0]
    assert await others == list(range(6))
    await line.close()


async def test_readers_and_those_who_wait_hear_of_a_bucket_that_cannot_be_made() -> None:
    line = BucketLine(PARTS, Maker(failing="2"), 1000)
    with pytest.raises(OSError, match="no room for 2"):
        await line.made_ahead()
    with line.join() as reader:
        buckets = reader.buckets()
        assert await read(buckets, 2) == [0, 1]
        with pytest.raises(OSError, match="no room for 2"):
            await anext(buckets)
    await line.close()


async def test_a_line_ends_in_the_middle_of_a_bucket() -> None:
    maker = Maker()
    maker.held.clear()
    line = BucketLine(PARTS, maker, 1000)
    await asyncio.sleep(0)
    await line.close()
    maker.held.set()
