"""Host memory into one buffer on a device: threads fill the next slots while the device copies those that are full."""

from __future__ import annotations

import bisect
import collections
import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from miles.weights.staging.ring import Bytes, Slot, StagingRing

Parts = Sequence[tuple[int, Bytes]]
"""Bytes by the offset where they belong; they ascend and do not overlap."""


def host_bytes(tensor: torch.Tensor) -> Bytes:
    """The bytes of a tensor in host memory, without copying them unless it has strides."""
    data: Bytes = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return data


def copy_to_device(flat: torch.Tensor, parts: Parts, ring: StagingRing, threads: concurrent.futures.Executor) -> None:
    """Copy parts to their offsets in `flat`, uint8 (n,), and return when they are there.

    What lies between parts is undefined afterwards. Any thread may call it, several at once with one ring.
    """
    starts = [start for start, _ in parts]
    end = max((start + part.size for start, part in parts), default=0)
    with _own_stream(flat.device) as stream, contextlib.ExitStack() as at_end:
        under_way = _UnderWay(flat[:end], ring, stream)
        at_end.callback(under_way.give_back)
        for begin in range(0, end, ring.slot_bytes):
            slot = under_way.next_slot()
            first = max(0, bisect.bisect_right(starts, begin) - 1)
            last = bisect.bisect_left(starts, begin + ring.slot_bytes)
            try:
                filled = threads.submit(_fill, slot.bytes, begin, parts[first:last])
            except BaseException:
                ring.give_back(slot)
                raise
            under_way.filling.append(_Filling(begin, slot, filled))
        while under_way.filling:
            under_way.copy_first()


@dataclasses.dataclass(frozen=True, slots=True)
class _Filling:
    """A slot that a thread fills with what belongs from `begin` on."""

    begin: int
    slot: Slot
    filled: concurrent.futures.Future[None]


class _UnderWay:
    """The slots that one copy holds, in order."""

    def __init__(self, flat: torch.Tensor, ring: StagingRing, stream: torch.cuda.Stream | None) -> None:
        self._flat = flat
        self._ring = ring
        self._stream = stream
        self.filling: collections.deque[_Filling] = collections.deque()

    def next_slot(self) -> Slot:
        """A slot to fill. Others may hold the rest of the ring, so nothing is held while waiting for one."""
        while self.filling:
            if len(self.filling) < max(1, self._ring.slots // 2) and (slot := self._ring.take_if_free()) is not None:
                return slot
            self.copy_first()
        return self._ring.take()

    def copy_first(self) -> None:
        """Have the device copy the slot that comes first, once it is filled, and give it back."""
        first = self.filling[0]
        first.filled.result()
        target = self._flat[first.begin : first.begin + self._ring.slot_bytes]
        target.copy_(first.slot.memory[: target.numel()], non_blocking=True)
        first.slot.mark(self._stream)
        self.filling.popleft()
        self._ring.give_back(first.slot)

    def give_back(self) -> None:
        """After an error: give back what no thread writes to any more."""
        concurrent.futures.wait([each.filled for each in self.filling])
        for each in self.filling:
            self._ring.give_back(each.slot)


@contextlib.contextmanager
def _own_stream(device: torch.device) -> Iterator[torch.cuda.Stream | None]:
    """A stream for these copies alone, which starts when the buffer is free and has ended when the block has."""
    if device.type != "cuda":
        yield None
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with contextlib.ExitStack() as at_end:
        at_end.callback(stream.synchronize)  # after an error, too: the buffer may be freed next
        at_end.enter_context(torch.cuda.stream(stream))
        yield stream


def _fill(target: Bytes, begin: int, parts: Parts) -> None:
    """Copy what belongs into the bytes from `begin` on, for which `target` stands."""
    for start, part in parts:
        low, high = max(start, begin), min(start + part.size, begin + target.size)
        if low < high:
            np.copyto(target[low - begin : high - begin], part[low - start : high - start])
