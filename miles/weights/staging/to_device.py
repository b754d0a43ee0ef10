"""Host tensors into one buffer on a device: threads fill the next slots while the device copies those that are full."""

from __future__ import annotations

import bisect
import collections
import concurrent.futures
import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from miles.weights.staging.ring import Bytes, Slot, StagingRing


def fill_on_device(
    flat: torch.Tensor, parts: Sequence[tuple[int, Bytes]], ring: StagingRing, threads: concurrent.futures.Executor
) -> None:
    """Copy parts to their offsets in `flat`, uint8 (n,), on the ring's device; return when they are there.

    Parts ascend and do not overlap; what lies between them is undefined.
    """
    starts = [start for start, _ in parts]
    end = min(flat.numel(), max((start + part.size for start, part in parts), default=0))
    filling: collections.deque[tuple[int, Slot, concurrent.futures.Future[None]]] = collections.deque()
    at_once = max(1, ring.slots // 2)
    with _own_stream(ring) as stream, contextlib.ExitStack() as at_end:
        at_end.callback(_give_back, ring, filling)
        for begin in range(0, end, ring.slot_bytes):
            slot = ring.take()
            here = parts[
                max(0, bisect.bisect_right(starts, begin) - 1) : bisect.bisect_left(starts, begin + slot.bytes.size)
            ]
            filling.append((begin, slot, threads.submit(_fill, slot.bytes, begin, here)))
            if len(filling) == at_once:
                _copy_first(flat, filling, ring, stream)
        while filling:
            _copy_first(flat, filling, ring, stream)
        if stream is not None:
            stream.synchronize()


@contextlib.contextmanager
def _own_stream(ring: StagingRing) -> Iterator[torch.cuda.Stream | None]:
    """A stream for the copies alone, which begin when what the caller's has to do with the buffer is done."""
    if ring.device.type != "cuda":
        yield None
        return
    stream = torch.cuda.Stream(ring.device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(ring.device))
    with torch.cuda.stream(stream):
        yield stream


def _copy_first(
    flat: torch.Tensor,
    filling: collections.deque[tuple[int, Slot, concurrent.futures.Future[None]]],
    ring: StagingRing,
    stream: torch.cuda.Stream | None,
) -> None:
    begin, slot, filled = filling[0]
    filled.result()
    target = flat[begin : begin + slot.bytes.size]
    target.copy_(slot.memory[: target.numel()], non_blocking=True)
    slot.mark(stream)
    filling.popleft()
    ring.give_back(slot)


def _give_back(
    ring: StagingRing, filling: collections.deque[tuple[int, Slot, concurrent.futures.Future[None]]]
) -> None:
    """After an error: give slots back once no thread writes to them."""
    concurrent.futures.wait([filled for _, _, filled in filling])
    for _, slot, _ in filling:
        ring.give_back(slot)


def _fill(target: Bytes, begin: int, parts: Sequence[tuple[int, Bytes]]) -> None:
    """Copy what lies in the bytes from `begin` on that the target stands for."""
    for start, part in parts:
        low, high = max(start, begin), min(start + part.size, begin + target.size)
        if low < high:
            np.copyto(target[low - begin : high - begin], part[low - start : high - start])
