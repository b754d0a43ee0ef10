"""The export of full tensors to rank 0 when every rank can say what changed in its shards since the last one.

every rank   compares its shards with those it keeps; gives up when it is too much
all          agree whether they all have the same export behind them, and whether changes are worth it
yes          rank 0 gets the changes, a bucket of tensors at a time, and applies them to its last export
no           the caller gathers everything; the ranks keep their shards, and rank 0 what was gathered
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist

from miles.services.trainer.changes.kept_shards import KeptShards, Shard
from miles.services.trainer.changes.shard_change import ShardChange, apply_change
from miles.services.trainer.changes.to_first_rank import PlacedChange, gather_changes, lowest_and_highest
from miles.weights.bucketing import buckets

logger = logging.getLogger(__name__)

Named = tuple[str, torch.Tensor]

WORTH_IT = 0.25
"""Largest part of the weights' bytes that changes may take. The ranks hold theirs until rank 0 has got them; and full
tensors are gathered on the ranks' devices, which is faster than over the hosts."""


class ChangedExports:
    """What one rank keeps from one export to the next."""

    def __init__(self) -> None:
        self._kept = KeptShards()
        self._full: dict[str, torch.Tensor] = {}
        """Rank 0: the last export. Its tensors are never written to, because transports may keep them too."""
        self._number = 0
        """Of the export that is kept, the same on every rank; 0 when there is none, or when it broke off."""
        self.gathered_bytes = 0
        """Rank 0: bytes of the last export that came from shards, its own included."""

    def export(
        self, shards: Callable[[], Iterable[Shard]], gathered: Callable[[], Iterable[Named]], bucket_bytes: int
    ) -> Iterator[Named]:
        """Full tensors by name in the order of `shards`, in host memory, on rank 0; collective.

        `shards` are this rank's, of the same tensors and in the same order on every rank; `gathered` are the full
        tensors, in that order, on every rank, for when too much has changed. Nobody may write to what this yields.
        """
        lowest, highest = lowest_and_highest(self._number)
        self._number = 0  # until the end, which an error may prevent
        changes = self._find_changes(shards()) if 0 < lowest == highest else None
        worth_it, _ = lowest_and_highest(int(changes is not None))
        if changes is not None and worth_it:
            yield from self._apply_changes(changes, bucket_bytes)
        else:
            del changes
            yield from self._take_all(shards, gathered())
        self._number = highest + 1

    def _find_changes(self, shards: Iterable[Shard]) -> list[_Found] | None:
        """This rank's changes, or None when they take too much of its shards' bytes."""
        found: list[_Found] = []
        room = WORTH_IT * self._kept.nbytes
        for shard in shards:  # to the end in any case: reading them may be collective
            if room < 0:
                found.clear()
                continue
            found.append(_Found(shard, self._kept.update(shard)))
            room -= found[-1].change.data.numel()
        return None if room < 0 else found

    def _apply_changes(self, found: list[_Found], bucket_bytes: int) -> Iterator[Named]:
        self.gathered_bytes = total = 0
        for bucket in buckets(found, bucket_bytes):
            by_tensor = gather_changes([each.placed for each in bucket], [each.itemsize for each in bucket])
            for each, changes in zip(bucket, by_tensor, strict=False):  # none on other ranks
                self.gathered_bytes += sum(placed.change.data.numel() for placed in changes)
                self._full[each.name] = full = changed_tensor(self._full[each.name], changes)
                total += full.nbytes
                yield each.name, full
        if dist.get_rank() == 0:
            logger.info("gathered %.3f GB of changes to %.3f GB of weights", self.gathered_bytes / 1e9, total / 1e9)

    def _take_all(self, shards: Callable[[], Iterable[Shard]], gathered: Iterable[Named]) -> Iterator[Named]:
        self.gathered_bytes = 0
        for name, tensor in gathered:
            if dist.get_rank() == 0:
                self.gathered_bytes += tensor.nbytes
                full = torch.empty(tensor.shape, dtype=tensor.dtype)
                self._full[name] = full.copy_(tensor.detach())
                yield name, full
        for shard in shards():
            self._kept.take(shard)


class _Found:
    """A shard's change, without the shard."""

    __slots__ = ("begin", "change", "itemsize", "name", "nbytes", "numel")

    def __init__(self, shard: Shard, change: ShardChange) -> None:
        self.name = shard.name
        self.begin, self.numel, self.itemsize = shard.begin, shard.elements.numel(), shard.elements.element_size()
        self.nbytes = math.prod(shard.shape) * self.itemsize
        """Of the full tensor, so that all ranks make the same buckets."""
        self.change = change

    @property
    def placed(self) -> PlacedChange:
        return PlacedChange(self.begin, self.numel, self.change)


def changed_tensor(old: torch.Tensor, changes: Iterable[PlacedChange]) -> torch.Tensor:
    """A new tensor with the changes applied; the old one itself when there are none."""
    real = [each for each in changes if each.change.count]
    if not real:
        return old
    new = old.clone()
    flat = new.view(-1)
    for each in real:
        apply_change(each.change, flat[each.begin : each.begin + each.numel])
    return new
