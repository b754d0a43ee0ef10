"""A ring of staging buffers in pinned memory, through which copies between a device and the host are fast.

The driver copies from and to pageable memory through small buffers of its own, while the caller waits. From and to
pinned memory the device copies by itself, at the rate of the bus. The files and buffers that hold versions are not
pinned: that takes longer than a copy, for each new file again, and counts against a limit that may be low.
"""

from __future__ import annotations

import functools
import queue
import threading

import numpy as np
import numpy.typing as npt
import torch

Bytes = npt.NDArray[np.uint8]

SLOT_BYTES = 16 << 20
"""Large enough that the bus is busy, and small enough to keep several threads busy on the other side."""
SLOTS = 16


class Slot:
    """One staging buffer: in use by the host, by a device, or by nobody."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        """uint8 (n,)."""
        self.bytes: Bytes = memory.numpy()
        """The same."""
        self._used: torch.cuda.Event | None = None

    def mark(self, stream: torch.cuda.Stream | None) -> None:
        """Note that the slot is in use until the stream has done what it has been given; None: nothing is under way."""
        if stream is not None:
            self._used = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # spinning takes cores
            self._used.record(stream)

    def wait(self) -> None:
        """Return once the stream of the last `mark` has done what it had been given then."""
        if self._used is not None:
            self._used.synchronize()
            self._used = None


class StagingRing:
    """A fixed number of slots for any device; they are allocated at first use and kept. Any thread may call it.

    Who waits for a slot must not hold another one that only he can give back.
    """

    def __init__(self, *, pin_memory: bool, slot_bytes: int = SLOT_BYTES, slots: int = SLOTS) -> None:
        """`slot_bytes`: a multiple of 64, so that tensors of any type can begin at such offsets.

        Without `pin_memory` slots are ordinary memory, for copies within the host.
        """
        self._pin_memory = pin_memory
        self.slot_bytes = slot_bytes
        self.slots = slots
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._allocated = False

    def take(self) -> Slot:
        """A slot that nobody uses; waits until one is given back, and until its device is done with it."""
        self._allocate()
        return self._ready(self._free.get())

    def take_if_free(self) -> Slot | None:
        """Like `take`, but None while all slots are taken."""
        self._allocate()
        try:
            return self._ready(self._free.get_nowait())
        except queue.Empty:
            return None

    def give_back(self, slot: Slot) -> None:
        """Let others have a slot, of which a device may still make the use that was marked."""
        self._free.put(slot)

    def _ready(self, slot: Slot) -> Slot:
        try:
            slot.wait()
        except BaseException:
            self._free.put(slot)
            raise
        return slot

    def _allocate(self) -> None:
        """All slots in one piece: pinning takes a while, and torch rounds every piece up to a power of two."""
        with self._lock:
            if not self._allocated:
                memory = torch.empty(self.slots * self.slot_bytes, dtype=torch.uint8, pin_memory=self._pin_memory)
                for begin in range(0, memory.numel(), self.slot_bytes):
                    self._free.put(Slot(memory[begin : begin + self.slot_bytes]))
                self._allocated = True


@functools.cache
def pinned_ring() -> StagingRing:
    """The pinned slots of this process, 256 MB."""
    return StagingRing(pin_memory=True)


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The calling thread's stream on a GPU; None on a CPU, where a copy is done when its call returns."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None
