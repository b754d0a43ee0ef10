"""Rows laid out in slots, and back, with gradients that are summed in a fixed order.

Dims: T rows, S slots.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import embedding_bag

from miles.algorithms.device_copies import to_device


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    """Which row is in each slot, and back. A row may be in several slots."""

    row_of_slot_S: torch.Tensor
    """int64; 0 in padded slots."""
    slots_by_row: torch.Tensor
    """int64; slots that hold row 0, then those of row 1, ...; padded slots are left out."""
    starts_T: torch.Tensor
    """int64; where each row's slots begin in `slots_by_row`."""


def slots_of(row_of_slot: npt.NDArray[np.int64], rows: int, device: torch.device) -> Slots:
    """From the row in each slot, -1 where padded."""
    by_row = np.argsort(row_of_slot, kind="stable")[np.count_nonzero(row_of_slot < 0) :]
    starts = np.searchsorted(row_of_slot[by_row], np.arange(rows))
    return Slots(
        row_of_slot_S=to_device(torch.from_numpy(np.maximum(row_of_slot, 0)), device),
        slots_by_row=to_device(torch.from_numpy(by_row), device),
        starts_T=to_device(torch.from_numpy(starts.astype(np.int64)), device),
    )


class _ToSlots(torch.autograd.Function):
    """Rows to slots; the gradient of a row is the sum over its slots."""

    @staticmethod
    def forward(ctx: Any, x_T: torch.Tensor, slots: Slots) -> torch.Tensor:
        ctx.slots = slots
        return x_T.index_select(0, slots.row_of_slot_S)

    @staticmethod
    def backward(ctx: Any, grad_S: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _sum_slots(grad_S, ctx.slots), None


class _FromSlots(torch.autograd.Function):
    """Query slots back to rows; padded slots get gradient 0."""

    @staticmethod
    def forward(ctx: Any, x_S: torch.Tensor, slots: Slots) -> torch.Tensor:
        ctx.slots = slots
        return x_S.index_select(0, slots.slots_by_row)

    @staticmethod
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple[torch.Tensor, None]:
        slots: Slots = ctx.slots
        grad_S = grad_T.new_zeros(len(slots.row_of_slot_S), *grad_T.shape[1:])
        return grad_S.index_copy_(0, slots.slots_by_row, grad_T), None


def to_slots(x_T: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Rows to slots; [S, ...]."""
    out_S: torch.Tensor = _ToSlots.apply(x_T, slots)  # type: ignore[no-untyped-call]
    return out_S


def from_slots(x_S: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Slots to rows, each of which has one slot; [T, ...]."""
    out_T: torch.Tensor = _FromSlots.apply(x_S, slots)  # type: ignore[no-untyped-call]
    return out_T


def _sum_slots(x_S: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Sum over each row's slots, in a fixed order; [T, ...]."""
    summed_T = embedding_bag(slots.slots_by_row, x_S.flatten(1), slots.starts_T, mode="sum")
    return summed_T.view(-1, *x_S.shape[1:])
