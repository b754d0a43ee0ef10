"""The buckets that one trainer rank keeps in host memory until no engine can ask for them any more."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Collection, Sequence

import torch

from miles.rpc.gen import policy_pb2
from miles.weights import flat as flats


@dataclasses.dataclass(frozen=True, slots=True)
class StagedBucket:
    """A bucket of one version."""

    descriptors: list[policy_pb2.TensorDescriptor]
    flat: torch.Tensor
    """uint8 (n,), in host memory."""

    def bytes(self, packed: bool) -> torch.Tensor:
        """What is sent, uint8 (n,); `packed`: without the gaps that align tensors."""
        return flats.packed(self.flat, self.descriptors) if packed else self.flat


class StagedBuckets:
    """The buckets of every version that engines may ask for; any thread may call it."""

    def __init__(self, pin_memory: bool) -> None:
        self._pin_memory = pin_memory
        self._lock = threading.Lock()
        self._buckets: dict[int, list[StagedBucket]] = {}
        """By publication."""
        self._spare: dict[int, list[torch.Tensor]] = {}
        """Memory to reuse, by size."""
        self._in_use = 0
        """Publication that is being broadcast; 0 for none."""

    def buffer(self, nbytes: int) -> torch.Tensor:
        """Host memory for a bucket, uint8 (nbytes,); it may have held a bucket of an older version."""
        with self._lock:
            if spare := self._spare.get(nbytes):
                return spare.pop()
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pin_memory)

    def add(self, publication_id: int, descriptors: Sequence[policy_pb2.TensorDescriptor], flat: torch.Tensor) -> None:
        """Keep a bucket of a version."""
        with self._lock:
            self._buckets.setdefault(publication_id, []).append(StagedBucket(list(descriptors), flat))

    def of(self, publication_id: int) -> list[StagedBucket]:
        """The buckets of a version; none when it is not kept."""
        with self._lock:
            return list(self._buckets.get(publication_id, ()))

    def use(self, publication_id: int) -> None:
        """Do not reuse the memory of this version, which is being broadcast; 0 ends that."""
        with self._lock:
            self._in_use = publication_id

    def trim(self, live: Collection[int]) -> None:
        """Forget the versions that are not live, and reuse their memory."""
        with self._lock:
            self._spare.clear()
            for publication_id in set(self._buckets) - set(live):
                gone = self._buckets.pop(publication_id)
                for bucket in gone if publication_id != self._in_use else []:
                    self._spare.setdefault(bucket.flat.numel(), []).append(bucket.flat)

    def forget(self, publication_id: int) -> None:
        """Forget one version."""
        with self._lock:
            self._buckets.pop(publication_id, None)

    def nbytes(self) -> int:
        """Bytes kept for engines to ask for."""
        with self._lock:
            return sum(bucket.flat.numel() for buckets in self._buckets.values() for bucket in buckets)

    def clear(self) -> None:
        """Forget every version."""
        with self._lock:
            self._buckets.clear()
            self._spare.clear()
