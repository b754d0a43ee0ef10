"""What changed in one shard: found, packed into bytes and applied, on any device.

A change is a list of steps to the next changed element and of the elements' new values. A step has 16 bits; longer ways
are walked in steps of 65,536 elements, with the values that are there anyway. A changed bfloat16 value takes 4 bytes.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

_LONGEST_STEP = 1 << 16
_STEP_BYTES = 2
_PIECE, _PIECE_ON_GPU = 1 << 18, 1 << 26
"""Elements that are compared at once: on a CPU few enough for its cache."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of an element's size, by that size in bytes: what is compared are bits, so that NaN equals itself."""

WHOLE = -1
"""Count of a change that consists of all elements of the shard."""


@dataclasses.dataclass(frozen=True, slots=True)
class ShardChange:
    """New values of a shard's elements."""

    count: int
    """Values, including those in between; 0 when nothing changed, WHOLE when all follow one another."""
    data: torch.Tensor
    """Steps (uint16), then values; or all elements. uint8 (n,) in host memory."""


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers of the elements' size; the tensor is flat."""
    return tensor.view(_BITS[tensor.element_size()])


def packed_size(count: int, numel: int, itemsize: int) -> int:
    """Bytes of a change of a shard of `numel` elements of `itemsize` bytes."""
    return numel * itemsize if count == WHOLE else count * (_STEP_BYTES + itemsize)


def find_change(old: torch.Tensor, new: torch.Tensor) -> ShardChange:
    """What makes `new` of `old`, flat tensors of one dtype and size; WHOLE when that takes no more bytes.

    Works on the device of `new`, to which `old` is copied a piece at a time.
    """
    old, new = bits(old), bits(new)
    limit = new.nbytes // (_STEP_BYTES + new.element_size())
    found: list[torch.Tensor] = []
    count, piece = 0, _PIECE_ON_GPU if new.is_cuda else _PIECE
    for begin in range(0, new.numel(), piece):
        changed = _differing(old[begin : begin + piece], new[begin : begin + piece])
        count += changed.numel()
        if count > limit:
            return whole(new)
        if changed.numel():
            found.append(changed.add_(begin))
    if not found:
        return ShardChange(0, torch.empty(0, dtype=torch.uint8))
    positions = torch.cat(found)
    steps = positions.diff(prepend=positions.new_tensor([-1]))
    if int(steps.max()) > _LONGEST_STEP:
        steps = _split(steps)
        positions = steps.cumsum(0) - 1
        if len(positions) > limit:
            return whole(new)
    parts = [(steps - 1).to(torch.int16), new[positions]]
    return ShardChange(len(positions), torch.cat([part.view(torch.uint8) for part in parts]).cpu())


def whole(new: torch.Tensor) -> ShardChange:
    """All elements of a flat tensor."""
    return ShardChange(WHOLE, new.reshape(-1).view(torch.uint8).to("cpu", copy=True))


def apply_change(change: ShardChange, target: torch.Tensor) -> None:
    """Turn a shard's old elements in `target`, a flat tensor on any device, into its new ones.

    ValueError when the change is not one of a shard of this size.
    """
    elements = bits(target)
    expected = packed_size(change.count, elements.numel(), elements.element_size())
    if change.data.numel() != expected:
        raise ValueError(f"a change of {change.count} elements has {change.data.numel()} bytes instead of {expected}")
    if not change.count:
        return
    if change.count == WHOLE:
        elements.copy_(_typed(change.data, elements.dtype))
        return
    cut = _STEP_BYTES * change.count
    steps = _typed(change.data[:cut], torch.int16).to(target.device).long().bitwise_and_(_LONGEST_STEP - 1)
    positions = steps.add_(1).cumsum(0) - 1
    if int(positions[-1]) >= elements.numel():
        raise ValueError(f"a change is to element {int(positions[-1])} of a shard of {elements.numel()}")
    elements[positions] = _typed(change.data[cut:], elements.dtype).to(target.device)


def _differing(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Where two pieces differ; int64."""
    if new.is_cuda:
        return (old.to(new.device, non_blocking=True) != new).nonzero().view(-1)
    return torch.from_numpy(np.flatnonzero(old.numpy() != new.numpy()))  # three times as fast as torch's


def _typed(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes as elements; copied when they are not aligned."""
    if data.data_ptr() % dtype.itemsize or data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype)


def _split(steps: torch.Tensor) -> torch.Tensor:
    """The same way in steps that are short enough; int64."""
    more = (steps - 1).div(_LONGEST_STEP, rounding_mode="floor")
    ends = (more + 1).cumsum(0) - 1
    short = torch.full((int(ends[-1]) + 1,), _LONGEST_STEP, dtype=steps.dtype, device=steps.device)
    short[ends] = steps - more * _LONGEST_STEP
    return short
