"""The KV cache: keys and values of the running requests, by slot and absolute position."""

from __future__ import annotations

from collections.abc import Sequence

import torch

LENGTH_MULTIPLE = 64
_WHOLE_SUM, _SPLIT_SUMS = 192, 384
"""MKL adds up to 192 terms in one go, and 384 or more in such goes; sums of lengths between them it cuts in halves."""


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def attention_length(positions: int) -> int:
    """The positions that attention spans to see so many.

    Its sums are then grouped the same way whatever it spans beyond those that it sees, whose terms are all zeros.
    """
    if _WHOLE_SUM < positions < _SPLIT_SUMS:
        return _SPLIT_SUMS
    return round_up(positions, LENGTH_MULTIPLE)


class KVCache:
    """Keys (layers, slots, kv heads, head dim, positions) and values (layers, slots, kv heads, positions, head dim).

    The key of position p always lies at index p. Room for slots and positions grows on demand, by doubling, up to
    `max_slots` and `max_length`. Unwritten places hold zeros, never NaN, because a masked weight of 0 multiplies them.
    """

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        max_slots: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`value_dim`: elements of a head's values; None: as many as its keys have."""
        self._max_slots = max_slots
        self._max_length = attention_length(max_length)
        self.keys_LSHDT = torch.zeros(layers, 0, kv_heads, head_dim, 0, dtype=dtype, device=device)
        self.values_LSHTD = torch.zeros(layers, 0, kv_heads, 0, value_dim or head_dim, dtype=dtype, device=device)

    @property
    def slots(self) -> int:
        """Slots that there is room for now."""
        return self.keys_LSHDT.shape[1]

    @property
    def length(self) -> int:
        """Positions that there is room for now in each slot."""
        return self.keys_LSHDT.shape[4]

    def reserve(self, slots: int, length: int) -> None:
        """Make room for at least this many slots of at least this many positions.

        Raises ValueError beyond `max_slots` or `max_length`.
        """
        if slots > self._max_slots or length > self._max_length:
            raise ValueError(
                f"asked for {slots} slots of {length} positions; the cache has at most {self._max_slots} of "
                f"{self._max_length}"
            )
        if slots <= self.slots and length <= self.length:
            return
        new_slots = self.slots if slots <= self.slots else min(self._max_slots, max(slots, 2 * self.slots))
        wanted = max(attention_length(length), attention_length(2 * self.length))
        new_length = self.length if length <= self.length else min(self._max_length, wanted)
        self._grow(new_slots, new_length)

    def _grow(self, slots: int, length: int) -> None:
        layers, old_slots, heads, dim, old_length = self.keys_LSHDT.shape
        keys = self.keys_LSHDT.new_zeros(layers, slots, heads, dim, length)
        keys[:, :old_slots, ..., :old_length] = self.keys_LSHDT
        self.keys_LSHDT = keys
        values = self.values_LSHTD.new_zeros(layers, slots, heads, length, self.values_LSHTD.shape[-1])
        values[:, :old_slots, :, :old_length] = self.values_LSHTD
        self.values_LSHTD = values

    def write(
        self,
        layer: int,
        slots_N: torch.Tensor,
        positions_N: torch.Tensor,
        keys_NHD: torch.Tensor,
        values_NHD: torch.Tensor,
    ) -> None:
        """Store one layer's keys and values of N tokens at their slots and positions."""
        self.keys_LSHDT[layer][slots_N, :, :, positions_N] = keys_NHD
        self.values_LSHTD[layer][slots_N, :, positions_N] = values_NHD

    def copy(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copy the first `length` positions of slot `source` to each target slot."""
        for target in targets:
            self.keys_LSHDT[:, target, ..., :length] = self.keys_LSHDT[:, source, ..., :length]
            self.values_LSHTD[:, target, :, :length] = self.values_LSHTD[:, source, :, :length]
