"""Tensors of a device into host memory: it copies the next ones while threads move and hash those that have arrived.

device   convert, if need be ──► slot ──► slot ──► slot      on the caller's stream
threads                          copy to its place, hash      as soon as the slot has arrived
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading

import numpy as np
import torch

from miles.rpc.gen import policy_pb2
from miles.weights.dtypes import TORCH_DTYPE
from miles.weights.manifest import Checksum, aligned, checksum
from miles.weights.staging.ring import Bytes, Slot, StagingRing, current_stream

PIECE_BYTES = 1 << 20
"""Copied at a time before it is hashed, so that it is still in the core's own cache."""


class _Tensor:
    """A tensor on its way."""

    def __init__(self, descriptor: policy_pb2.TensorDescriptor, room: Bytes) -> None:
        self.descriptor = descriptor
        self.room = room
        self._missing = descriptor.nbytes
        self._lock = threading.Lock()

    def arrived(self, nbytes: int) -> bool:
        """Count bytes that are in their place; whether they were the last ones."""
        with self._lock:
            self._missing -= nbytes
            return self._missing == 0


class _Part:
    """Bytes of a tensor in a slot."""

    __slots__ = ("begin", "nbytes", "start", "tensor")

    def __init__(self, tensor: _Tensor, begin: int, start: int, nbytes: int) -> None:
        self.tensor = tensor
        self.begin = begin
        """Offset in the tensor."""
        self.start = start
        """Offset in the slot."""
        self.nbytes = nbytes


class ToHost:
    """One batch of tensors; a context manager, at the end of which all of them are in place and have their checksums.

    When the body or a copy fails, it raises once nothing writes to their places any more, and the ring can be used
    again.

    Everything on the device happens in order on the caller's stream. So a tensor may be freed as soon as it has been
    added: memory that is reused on that stream is written to only after it has been copied.
    """

    def __init__(self, ring: StagingRing, threads: concurrent.futures.Executor) -> None:
        """`threads` do nothing else that waits for slots."""
        self._ring = ring
        self._threads = threads
        self._working: list[concurrent.futures.Future[None]] = []
        self._slot: Slot | None = None
        self._device = torch.device("cpu")
        """Of what is in the slot."""
        self._filled = 0
        self._parts: list[_Part] = []

    def __enter__(self) -> ToHost:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.ExitStack() as at_end:
            at_end.callback(concurrent.futures.wait, self._working)
            at_end.callback(self._abandon)
            if kind is None:
                self._ship()
        if kind is None:
            for future in self._working:
                future.result()

    def add(self, descriptor: policy_pb2.TensorDescriptor, tensor: torch.Tensor, room: Bytes) -> None:
        """Begin to copy a tensor to its place, uint8 (descriptor.nbytes,), in the descriptor's type.

        Sets the descriptor's checksum, if it is missing, by the end. Waits for slots.
        """
        dtype = TORCH_DTYPE[descriptor.dtype]
        one = _Tensor(descriptor, room)
        if not descriptor.nbytes:
            _hash(one)
            return
        if not tensor.is_contiguous():
            tensor = torch.empty(tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)
        elements, begin = tensor.reshape(-1), 0
        while begin < descriptor.nbytes:
            slot, start = self._place(tensor.device, dtype.itemsize)
            nbytes = min(self._ring.slot_bytes - start, descriptor.nbytes - begin)
            nbytes -= nbytes % dtype.itemsize
            piece = elements[begin // dtype.itemsize : (begin + nbytes) // dtype.itemsize]
            # Converted on the device: half as many bytes of float32 go over the bus as bfloat16.
            slot.memory[start : start + nbytes].view(dtype).copy_(piece.to(dtype), non_blocking=True)
            self._parts.append(_Part(one, begin, start, nbytes))
            begin, self._filled = begin + nbytes, start + nbytes

    def _place(self, device: torch.device, itemsize: int) -> tuple[Slot, int]:
        """A slot with room for an element at least, and the offset where it begins."""
        start = aligned(self._filled)
        if start + itemsize > self._ring.slot_bytes or device != self._device:
            self._ship()
        if self._slot is None:
            self._slot, self._device, start = self._ring.take(), device, 0
        return self._slot, start

    def _ship(self) -> None:
        """Have a thread take what is in the slot, once it has arrived."""
        if self._slot is None:
            return
        self._slot.mark(current_stream(self._device))
        self._working.append(self._threads.submit(self._unload, self._slot, self._parts))
        self._slot, self._filled, self._parts = None, 0, []

    def _abandon(self) -> None:
        """Give back a slot of which nobody will take anything."""
        slot, self._slot = self._slot, None
        if slot is not None:
            with contextlib.ExitStack() as at_end:
                at_end.callback(self._ring.give_back, slot)
                slot.mark(current_stream(self._device))

    def _unload(self, slot: Slot, parts: list[_Part]) -> None:
        complete = []
        try:
            slot.wait()
            for part in parts:
                source = slot.bytes[part.start : part.start + part.nbytes]
                if part.nbytes == part.tensor.descriptor.nbytes:
                    copy_and_hash(part.tensor.descriptor, source, part.tensor.room)
                    continue
                np.copyto(part.tensor.room[part.begin : part.begin + part.nbytes], source)
                if part.tensor.arrived(part.nbytes):
                    complete.append(part.tensor)
        finally:
            self._ring.give_back(slot)
        for tensor in complete:  # its parts arrived in any order, and are hashed in theirs
            _hash(tensor)


def copy_and_hash(descriptor: policy_pb2.TensorDescriptor, source: Bytes | None, room: Bytes) -> None:
    """Copy a tensor's bytes, a piece at a time, and set its checksum, unless it has one.

    `source` None: they are in their place already.
    """
    running = Checksum()
    for begin in range(0, descriptor.nbytes, PIECE_BYTES):
        piece = room[begin : begin + PIECE_BYTES]
        if source is not None:
            np.copyto(piece, source[begin : begin + PIECE_BYTES])
        running.update(piece.data)
    if not descriptor.checksum:
        descriptor.checksum = running.digest()


def _hash(tensor: _Tensor) -> None:
    if not tensor.descriptor.checksum:
        tensor.descriptor.checksum = checksum(tensor.room.data)
