"""Changes of all ranks' shards to rank 0, point to point over the default group's CPU side (gloo)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist

from miles.services.trainer.changes.shard_change import ShardChange, packed_size

_FIELDS = 3
"""Numbers that describe a change: first element, elements of the shard, count."""


@dataclasses.dataclass(frozen=True, slots=True)
class PlacedChange:
    """A change and where its shard lies in the flattened full tensor, in elements."""

    begin: int
    numel: int
    change: ShardChange


def lowest_and_highest(value: int) -> tuple[int, int]:
    """Over the values that the ranks give; collective."""
    extremes = torch.tensor([-value, value])
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    return -int(extremes[0]), int(extremes[1])


def gather_changes(mine: Sequence[PlacedChange], itemsizes: Sequence[int]) -> list[list[PlacedChange]]:
    """On rank 0, every tensor's changes from all ranks; empty on the others. Collective.

    `mine` are this rank's changes of the same tensors on every rank, whose elements have `itemsizes` bytes.
    """
    described = torch.tensor([[each.begin, each.numel, each.change.count] for each in mine]).view(-1, _FIELDS)
    if dist.get_rank():
        dist.gather(described)
        data = torch.cat([each.change.data for each in mine])
        if data.numel():
            dist.send(data, dst=0)
        return []
    all_described = [torch.empty_like(described) for _ in range(dist.get_world_size())]
    dist.gather(described, all_described)
    received: list[list[PlacedChange]] = [[each] for each in mine]
    waiting = [_receive(rank, theirs, itemsizes) for rank, theirs in enumerate(all_described) if rank]
    for theirs, data, work in waiting:
        if work is not None:
            work.wait()
        end = 0
        for changes, (begin, numel, count), itemsize in zip(received, theirs.tolist(), itemsizes, strict=True):
            start, end = end, end + packed_size(count, numel, itemsize)
            changes.append(PlacedChange(begin, numel, ShardChange(count, data[start:end])))
    return received


def _receive(
    rank: int, described: torch.Tensor, itemsizes: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, dist.Work | None]:
    """Begin to receive another rank's changes; return their description and where they will be."""
    sizes = [packed_size(count, n, size) for (_, n, count), size in zip(described.tolist(), itemsizes, strict=True)]
    data = torch.empty(sum(sizes), dtype=torch.uint8)
    return described, data, dist.irecv(data, src=rank) if data.numel() else None
