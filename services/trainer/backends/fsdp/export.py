"""All-gather of sharded parameters for an export: while one bucket is read, the next one is gathered.

Every rank gathers every bucket, so any of them can send it, and none holds more than two at a time. Shards are
converted before they are gathered.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

from miles.services.trainer.backends.fsdp.model.sharded_model import full_tensor
from miles.services.trainer.changes.kept_shards import Shard as RankShard
from miles.weights.bucketing import buckets

_ALIGNMENT = 64

Allocate = Callable[[int], torch.Tensor]
"""Makes a bucket, uint8 (n,)."""
DtypeOf = Callable[[str, torch.dtype], torch.dtype]
"""The type in which a tensor of that name and type is exported."""


def gathered(
    weights: Iterable[tuple[str, torch.Tensor]], dtype_of: DtypeOf, bucket_bytes: int, allocate: Allocate
) -> Iterator[tuple[str, torch.Tensor]]:
    """Full tensors by name, in the order of `weights`, in the types that `dtype_of` says; collective over ranks.

    A bucket takes tensors up to `bucket_bytes` bytes, or one that is larger. Its memory is freed with its last
    tensor, so a reader that keeps no tensor beyond the next one keeps at most two buckets alive. Unsharded tensors are
    yielded as they are.
    """
    pending: _Gather | None = None
    exported = (_Member(name, w, dtype_of(name, w.dtype)) for name, w in weights)
    for members in buckets(exported, bucket_bytes):
        if pending is not None:
            # The reader frees the previous bucket only when it gets a tensor of this one.
            tensors = pending.finish()
            pending = None
            yield next(tensors)
            pending = _Gather(members, allocate)
            yield from tensors
            del tensors
        else:
            pending = _Gather(members, allocate)
    if pending is not None:
        yield from pending.finish()


@dataclasses.dataclass(frozen=True, slots=True)
class _Member:
    name: str
    tensor: torch.Tensor
    dtype: torch.dtype
    """As exported."""

    @property
    def shards(self) -> int:
        """Equal parts, the last ones padded, that the gathered tensor consists of; 1 for an unsharded one."""
        tensor = self.tensor
        if isinstance(tensor, DTensor) and tensor.device_mesh.size() > 1:
            return int(tensor.device_mesh.size())
        return 1

    @property
    def part_elements(self) -> int:
        """Elements of a part."""
        return math.ceil(self.tensor.shape[0] / self.shards) * math.prod(self.tensor.shape[1:])

    @property
    def nbytes(self) -> int:
        """Size of the full tensor as exported, in bytes."""
        return self.tensor.numel() * self.dtype.itemsize


class _Gather:
    """A bucket that is being gathered, from the constructor on."""

    def __init__(self, members: list[_Member], allocate: Allocate) -> None:
        self._members = members
        self._works: list[dist.Work | None] = []
        offsets = []
        end = 0
        for member in members:
            offsets.append(end)
            if member.shards > 1:
                size = member.shards * member.part_elements * member.dtype.itemsize
                end += -(-size // _ALIGNMENT) * _ALIGNMENT
        self._bucket = allocate(end) if end else None
        self._offsets = offsets
        for member, offset in zip(members, offsets, strict=True):
            self._works.append(self._start(member, offset) if member.shards > 1 else None)

    def finish(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors, each as soon as it is complete."""
        for member, offset, work in zip(self._members, self._offsets, self._works, strict=True):
            if member.shards == 1:
                yield member.name, local_tensor(member.tensor).to(member.dtype)
                continue
            if work is not None:
                work.wait()
            yield member.name, self._parts(member, offset)[: member.tensor.numel()].view(member.tensor.shape)

    def _parts(self, member: _Member, offset: int) -> torch.Tensor:
        """Room for a tensor's parts, one after the other, flat and of its dtype."""
        assert self._bucket is not None
        size = member.shards * member.part_elements * member.dtype.itemsize
        return self._bucket[offset : offset + size].view(member.dtype)

    def _start(self, member: _Member, offset: int) -> dist.Work | None:
        """Copy this rank's part into the bucket and start gathering the others'."""
        tensor, room = member.tensor, self._parts(member, offset)
        assert isinstance(tensor, DTensor)
        if tuple(tensor.placements) != (Shard(0),):
            room[: tensor.numel()].copy_(full_tensor(tensor).reshape(-1))
            return None
        rank = tensor.device_mesh.get_local_rank()
        mine = room[rank * member.part_elements : (rank + 1) * member.part_elements]
        local = local_tensor(tensor).reshape(-1)
        mine[: local.numel()].copy_(local)
        mine[local.numel() :].zero_()
        work: dist.Work = dist.all_gather_single(room, mine, group=tensor.device_mesh.get_group(), async_op=True)
        return work


def shards(weights: Iterable[tuple[str, torch.Tensor]], dtype_of: DtypeOf) -> Iterator[RankShard]:
    """This rank's shards of the tensors that `gathered` yields, in its order; rank 0 has unsharded ones to itself."""
    for name, tensor in weights:
        member = _Member(name, tensor, dtype_of(name, tensor.dtype))
        begin, elements = 0, local_tensor(tensor).reshape(-1)
        if member.shards > 1 and isinstance(tensor, DTensor) and tuple(tensor.placements) == (Shard(0),):
            begin = min(tensor.device_mesh.get_local_rank() * member.part_elements, tensor.numel())
        else:
            elements = full_tensor(tensor).reshape(-1) if member.shards > 1 else elements
            elements = elements if dist.get_rank() == 0 else elements[:0]
        yield RankShard(name, tuple(tensor.shape), begin, elements.to(member.dtype))


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor; all of an unsharded one."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached
