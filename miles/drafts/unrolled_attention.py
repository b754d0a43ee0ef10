"""Attention of packed samples over the steps of training-time test (EAGLE-3, arXiv 2503.01840, section 3.2).

At step 0 a row sees its sample's rows up to itself. At step j it sees those of step 0, whose keys are of the policy's
true hidden states, and the j keys that it had itself at the steps since: what it would have cached had it drafted j
tokens from there.

Dims: B samples of similar length, S rows of the longest, Q of them at a time, H heads, K kv heads, C elements of a
head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

QUERIES = 1024
"""Rows whose scores are computed at a time, which bounds the mask."""
_SPREAD = 1.5
"""A rectangle's longest sample over its shortest, at most."""


class PackedRows:
    """Packed samples as rectangles: of each, the rows' indices, padded with the sample's last row."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        self.rectangles: list[torch.Tensor] = []
        """[B, S], int64."""
        places_N, filled = torch.empty(starts[-1], dtype=torch.int64), 0
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
            self.rectangles.append(rectangle.to(device))
        self.places_N = places_N.to(device)
        """Where each row is in the rectangles, flattened one behind the other."""


class UnrolledAttention:
    """Attention of each layer over the steps of one batch: step 0 at its first call, step 1 at the next."""

    def __init__(self, rows: PackedRows) -> None:
        self._rows = rows
        self._keys: dict[int, list[torch.Tensor]] = {}
        self._values: dict[int, list[torch.Tensor]] = {}

    def __call__(
        self, layer: int, query_NHC: torch.Tensor, key_NKC: torch.Tensor, value_NKC: torch.Tensor
    ) -> torch.Tensor:
        """Outputs [N, H, C] of the layer's next step."""
        groups = query_NHC.shape[1] // key_NKC.shape[1]
        keys = self._keys.setdefault(layer, [])
        values = self._values.setdefault(layer, [])
        keys.append(key_NKC.repeat_interleave(groups, dim=1))
        values.append(value_NKC.repeat_interleave(groups, dim=1))
        outputs = [self._rectangle(index_BS, query_NHC, keys, values) for index_BS in self._rows.rectangles]
        return torch.cat(outputs)[self._rows.places_N]

    @staticmethod
    def _rectangle(
        index_BS: torch.Tensor, query_NHC: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]
    ) -> torch.Tensor:
        """Outputs [B S, H, C] of a rectangle. Rows behind a sample's last see too much, and nobody looks at them."""
        query = query_NHC[index_BS].transpose(1, 2)
        key, value = ([each[index_BS].transpose(1, 2) for each in steps] for steps in (keys, values))
        parts = [_attend(query, key, value, begin) for begin in range(0, index_BS.shape[1], QUERIES)]
        return torch.cat(parts, dim=2).transpose(1, 2).flatten(0, 1)


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
