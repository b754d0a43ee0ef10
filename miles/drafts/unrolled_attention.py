"""Attention of packed samples over the steps of training-time test (EAGLE-3, arXiv 2503.01840, section 3.2).

At step 0 a row sees its sample's rows up to itself. At step j it sees those of step 0, whose keys are of the policy's
true hidden states, and the j keys that it had itself at the steps since: what it would have cached had it drafted j
tokens from there.

Samples of similar length make up a rectangle, whose slots are padded with each sample's last row. Nobody sees a padded
slot's key or looks at its output, so its gradient is 0, and that of a row is its own slot's.

Dims: N rows, P slots of all rectangles, B samples of a rectangle, S rows of the longest, Q of them at a time, H heads,
K kv heads, C elements of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from miles.algorithms.device_copies import to_device

QUERIES = 1024
"""Rows whose scores are computed at a time, which bounds the mask."""
_SPREAD = 1.5
"""A rectangle's longest sample over its shortest, at most."""


class PackedRows:
    """Which row of packed samples is in each slot of their rectangles, and back."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        self.shapes: list[tuple[int, int]] = []
        """(B, S) of each rectangle."""
        rows, places_N, filled = [], torch.empty(starts[-1], dtype=torch.int64), 0
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        while order:
            longest = lengths[order[-1]]
            taken = [i for i in order if lengths[i] * _SPREAD >= longest]
            order = order[: -len(taken)]
            lengths_B1 = torch.tensor([lengths[i] for i in taken])[:, None]
            starts_B1 = torch.tensor([starts[i] for i in taken])[:, None]
            columns_S = torch.arange(longest)
            rectangle = starts_B1 + columns_S.minimum(lengths_B1 - 1)
            own = columns_S < lengths_B1
            places_N[rectangle[own]] = filled + own.flatten().nonzero()[:, 0]
            filled += rectangle.numel()
            rows.append(rectangle.flatten())
            self.shapes.append((len(taken), longest))
        self._rows_P, self._places_N = to_device(torch.cat(rows), device), to_device(places_N, device)

    def rectangles(self, input_N: torch.Tensor) -> list[torch.Tensor]:
        """Rows [N, H, C] as [B, H, S, C] of each rectangle."""
        slots_P: torch.Tensor = _ToSlots.apply(input_N, self._rows_P, self._places_N)  # type: ignore[no-untyped-call]
        parts = torch.split(slots_P, [blocks * longest for blocks, longest in self.shapes])
        return [
            part.view(*shape, *part.shape[1:]).transpose(1, 2) for part, shape in zip(parts, self.shapes, strict=True)
        ]

    def rows(self, rectangles: Sequence[torch.Tensor]) -> torch.Tensor:
        """The reverse of `rectangles`."""
        slots_P = torch.cat([each.transpose(1, 2).flatten(0, 1) for each in rectangles])
        found_N: torch.Tensor = _FromSlots.apply(slots_P, self._places_N)  # type: ignore[no-untyped-call]
        return found_N


class _ToSlots(torch.autograd.Function):
    """Autograd's own gradient of an index would add up what all slots of a row have, one behind the other on a GPU."""

    @staticmethod
    def forward(ctx: Any, input_N: torch.Tensor, rows_P: torch.Tensor, places_N: torch.Tensor) -> torch.Tensor:
        ctx.places_N = places_N
        return input_N.index_select(0, rows_P)

    @staticmethod
    def backward(ctx: Any, grad_P: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad_P.index_select(0, ctx.places_N), None, None


class _FromSlots(torch.autograd.Function):
    """Slots to rows; the gradient of padded ones is 0."""

    @staticmethod
    def forward(ctx: Any, input_P: torch.Tensor, places_N: torch.Tensor) -> torch.Tensor:
        ctx.places_N, ctx.shape = places_N, input_P.shape
        return input_P.index_select(0, places_N)

    @staticmethod
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_N.new_zeros(ctx.shape).index_copy_(0, ctx.places_N, grad_N), None


class UnrolledAttention:
    """Attention of each layer over the steps of one batch: step 0 at its first call, step 1 at the next."""

    def __init__(self, rows: PackedRows) -> None:
        self._rows = rows
        self._keys: dict[int, list[list[torch.Tensor]]] = {}
        """By layer, step and rectangle."""
        self._values: dict[int, list[list[torch.Tensor]]] = {}

    def __call__(
        self, layer: int, query_NHC: torch.Tensor, key_NKC: torch.Tensor, value_NKC: torch.Tensor
    ) -> torch.Tensor:
        """Outputs [N, H, C] of the layer's next step."""
        groups = query_NHC.shape[1] // key_NKC.shape[1]
        keys, values = self._keys.setdefault(layer, []), self._values.setdefault(layer, [])
        for steps, new_NKC in ((keys, key_NKC), (values, value_NKC)):
            steps.append([each.repeat_interleave(groups, dim=1) for each in self._rows.rectangles(new_NKC)])
        queries = self._rows.rectangles(query_NHC)
        return self._rows.rows(
            [
                _attend_rectangle(query, [step[i] for step in keys], [step[i] for step in values])
                for i, query in enumerate(queries)
            ]
        )


def _attend_rectangle(
    query_BHSC: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Outputs [B, H, S, C]. Padded slots see too much."""
    starts = range(0, query_BHSC.shape[2], QUERIES)
    return torch.cat([_attend(query_BHSC, keys, values, begin) for begin in starts], dim=2)


def _attend(
    query_BHSC: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], begin: int
) -> torch.Tensor:
    """Outputs [B, H, Q, C] of the rows from `begin` on; keys and values [B, H, S, C] of each step."""
    end = min(begin + QUERIES, query_BHSC.shape[2])
    query = query_BHSC[:, :, begin:end]
    if len(keys) == 1 and begin == 0:
        return scaled_dot_product_attention(query, keys[0][:, :, :end], values[0][:, :, :end], is_causal=True)
    own = torch.eye(end - begin, dtype=torch.bool, device=query.device)
    earlier = torch.ones(end - begin, end, dtype=torch.bool, device=query.device).tril(begin)
    key, value = (
        torch.cat([steps[0][:, :, :end], *(each[:, :, begin:end] for each in steps[1:])], dim=2)
        for steps in (keys, values)
    )
    mask = torch.cat([earlier, *[own] * (len(keys) - 1)], dim=1)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask)
