"""Moves what a backend holds on its device to host memory and back, in place: every tensor keeps its identity.

A tensor's storage is copied and then resized to nothing, as Megatron-Core does with its gradient buffers; parameters,
their shards, views and optimizers need not know. Nothing may compute with them until they are restored.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Iterable, Iterator

import torch

_CHUNK_BYTES = 64 << 20
"""Host memory is pinned in chunks of this size: PyTorch would round a pinned allocation up to a power of two."""
_ALIGNMENT = 512


@dataclasses.dataclass(frozen=True, slots=True)
class Held:
    """What is held on the device."""

    kept: Callable[[], Iterable[torch.Tensor]]
    """Tensors whose contents must come back: parameters, buffers, optimizer state."""
    scratch: Callable[[], Iterable[torch.Tensor]] = tuple
    """Tensors whose contents do not matter, such as gradients that are cleared before they are added to; they come back
    as zeros."""


@dataclasses.dataclass(frozen=True, slots=True)
class Moved:
    """One way of a swap."""

    nbytes: int = 0
    """Device memory that was freed or allocated, in bytes."""
    seconds: float = 0.0


class Parking:
    """Host memory for what is held on a device; allocated at the first `park` and kept."""

    def __init__(self, held: Held, device: torch.device) -> None:
        self._held = held
        self._device = device
        self._host: list[torch.Tensor] = []
        self._parked: list[tuple[torch.UntypedStorage, int]] = []
        self._emptied: list[tuple[torch.UntypedStorage, int]] = []

    @property
    def is_parked(self) -> bool:
        """Whether the device holds nothing."""
        return bool(self._parked or self._emptied)

    @property
    def host_bytes(self) -> int:
        """Host memory taken, in bytes."""
        return sum(chunk.nbytes for chunk in self._host)

    def park(self) -> Moved:
        """Copy everything to host memory and free it on the device. Raises RuntimeError where memory is out."""
        if self.is_parked:
            return Moved()
        began = time.monotonic()
        emptied = self._storages(self._held.scratch(), but=())
        kept = self._storages(self._held.kept(), but=emptied)
        sizes = [(storage, storage.nbytes()) for storage in kept]
        for on_device, on_host in self._pieces(sizes):
            on_host.copy_(on_device, non_blocking=True)
        self._wait()
        self._parked, self._emptied = sizes, [(storage, storage.nbytes()) for storage in emptied]
        for storage, _ in (*self._parked, *self._emptied):
            storage.resize_(0)
        free_cached(self._device)
        return Moved(self._nbytes, time.monotonic() - began)

    def restore(self) -> Moved:
        """Allocate everything on the device again, with the contents that it had."""
        if not self.is_parked:
            return Moved()
        began, nbytes = time.monotonic(), self._nbytes
        for storage, size in (*self._parked, *self._emptied):
            storage.resize_(size)
        for on_device, on_host in self._pieces(self._parked):
            on_device.copy_(on_host, non_blocking=True)
        for storage, _ in self._emptied:
            _bytes_of(storage).zero_()
        self._wait()
        self._parked, self._emptied = [], []
        return Moved(nbytes, time.monotonic() - began)

    @property
    def _nbytes(self) -> int:
        return sum(size for _, size in (*self._parked, *self._emptied))

    def _storages(
        self, tensors: Iterable[torch.Tensor], but: Iterable[torch.UntypedStorage]
    ) -> list[torch.UntypedStorage]:
        """The storages of tensors on the device that have memory of their own, each once: not mapped files."""
        known = {storage.data_ptr() for storage in but}
        found = []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            own = storage.device.type == self._device.type and storage.nbytes() and storage.resizable()
            if own and storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                found.append(storage)
        return found

    def _pieces(self, sizes: Iterable[tuple[torch.UntypedStorage, int]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each storage's bytes beside their place in host memory, in pieces, uint8; allocates chunks as needed."""
        chunk, start = 0, 0
        for storage, size in sizes:
            on_device, done = _bytes_of(storage), 0
            while done < size:
                if chunk == len(self._host):
                    memory = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
                    self._host.append(memory)
                count = min(size - done, _CHUNK_BYTES - start)
                yield on_device[done : done + count], self._host[chunk][start : start + count]
                done, start = done + count, start + -(-count // _ALIGNMENT) * _ALIGNMENT
                if start >= _CHUNK_BYTES:
                    chunk, start = chunk + 1, 0

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def free_cached(device: torch.device) -> Moved:
    """Give back to the driver what PyTorch keeps for later tensors."""
    if device.type != "cuda":
        return Moved()
    began, before = time.monotonic(), torch.cuda.memory_reserved(device)
    gc.collect()  # tensors in reference cycles would keep their memory
    torch.cuda.empty_cache()
    return Moved(before - torch.cuda.memory_reserved(device), time.monotonic() - began)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """A storage as uint8 (n,)."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
