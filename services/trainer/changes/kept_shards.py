"""A rank's shards as they were exported last, in host memory."""

from __future__ import annotations

import dataclasses

import torch

from miles.services.trainer.changes.shard_change import ShardChange, apply_change, bits, find_change


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """A rank's part of one tensor."""

    name: str
    shape: tuple[int, ...]
    """Of the full tensor."""
    begin: int
    """Index of the part's first element in the flattened full tensor."""
    elements: torch.Tensor
    """The part, flat, in the type in which it is exported, on any device; empty when other ranks have all of it."""


class KeptShards:
    """One copy of each shard; pinned where the weights are on a GPU, so that they are copied there fast."""

    def __init__(self) -> None:
        self._of: dict[str, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Memory that they take, in bytes."""
        return sum(kept.nbytes for kept in self._of.values())

    def take(self, shard: Shard) -> None:
        """Keep a shard as it is now."""
        elements, kept = shard.elements, self._of.get(shard.name)
        if kept is None or kept.shape != elements.shape or kept.dtype != elements.dtype:
            kept = self._of[shard.name] = torch.empty(elements.shape, dtype=elements.dtype, pin_memory=elements.is_cuda)
        kept.copy_(elements)

    def update(self, shard: Shard) -> ShardChange:
        """Find what has changed of a shard that is kept, and keep it as it is now."""
        kept = self._of[shard.name]
        change = find_change(kept, shard.elements)
        apply_change(change, kept)
        return change

    def has_changed(self, shard: Shard) -> bool:
        """Whether a shard is not as it is kept, or not kept yet; keep it as it is now."""
        elements, kept = shard.elements, self._of.get(shard.name)
        if kept is not None and kept.shape == elements.shape and kept.dtype == elements.dtype:
            there = kept.to(elements.device, non_blocking=True)
            if torch.equal(bits(there), bits(elements)):
                return False
        self.take(shard)
        return True
