"""Attention over a packed micro-batch: rows see their own segment and its prefix, never another sample.

`PACKED_ATTENTION` is registered with transformers' `AttentionInterface`; the plan of the micro-batch reaches it as the
keyword argument `attention_plan` of the model's forward. Three ways to compute the same thing:

- tiles: segments that belong together are gathered into a padded block [B, L] with a boolean mask, so that many short
  samples take one kernel call (CPU, and GPU in float32);
- segments: one call per segment, for samples too long to pad;
- varlen: PyTorch's variable-length flash attention (CUDA, bfloat16 or float16).

Dims: T rows, H query heads, K key/value heads, D head size, B blocks in a tile, L rows of a block.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from miles.services.trainer.backends.fsdp.packing import MicroBatch, Segment

PACKED_ATTENTION = "miles_packed"
MAX_TILE_ROWS = 512
TILE_ROUNDING = 32


@dataclasses.dataclass(frozen=True, slots=True)
class _Tile:
    """Blocks of at most L rows. Every row of the micro-batch is in exactly one block of one tile."""

    rows_BL: torch.Tensor
    """int64; the row in each slot, 0 where padded."""
    mask_B1LL: torch.Tensor
    """bool; True where the query slot may attend to the key slot. Padded queries attend to slot 0."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Varlen:
    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int
    key_rows: torch.Tensor | None
    """Rows in key order; None when keys are in row order."""


class AttentionPlan:
    """How to compute attention for one micro-batch; built once and used by every layer."""

    def __init__(
        self, micro_batch: MicroBatch, device: torch.device, dtype: torch.dtype, *, varlen: bool | None = None
    ) -> None:
        """`varlen`: use variable-length kernels; None where they run. Raises ValueError when they do not run here."""
        self.segments = micro_batch.segments
        self._positions = micro_batch.position_ids_T
        self._device = device
        families = _families(self.segments)
        can_varlen = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
        if varlen and not can_varlen:
            raise ValueError(
                f"attn_implementation varlen needs CUDA and 16-bit numbers, not {dtype} on {device.type}; set auto"
            )
        self.use_varlen = can_varlen if varlen is None else varlen
        self.use_tiles = not self.use_varlen and max((_size(f) for f in families), default=0) <= MAX_TILE_ROWS
        self._families = families
        self._tiles: dict[int | None, tuple[_Tile, ...]] = {}

    @functools.cached_property
    def slots(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Row of every slot of all tiles, slot of every row, and the padded slots; int64."""
        tiles = self.tiles(None)
        row_of_slot = torch.cat([tile.rows_BL.flatten() for tile in tiles])
        valid = torch.cat([_valid_slots(tile).flatten() for tile in tiles])
        slot_of_row = torch.empty(len(self._positions), dtype=torch.int64, device=self._device)
        slot_of_row[row_of_slot[valid]] = valid.nonzero().squeeze(1)
        return row_of_slot, slot_of_row, (~valid).nonzero().squeeze(1)

    def tiles(self, window: int | None) -> tuple[_Tile, ...]:
        """Tiles under a sliding window of so many rows; None for full attention."""
        if window not in self._tiles:
            self._tiles[window] = tuple(self._build_tile(families, window) for families in _buckets(self._families))
        return self._tiles[window]

    @functools.cached_property
    def varlen(self) -> _Varlen:
        """Sequence bounds for variable-length kernels, whose causal mask is aligned at the lower right."""
        q_lengths = [s.end - s.start for s in self.segments]
        k_lengths = [s.end - s.start + s.prefix_end - s.prefix_start for s in self.segments]
        key_rows = None
        if any(s.prefix_end > s.prefix_start for s in self.segments):
            pieces = [np.r_[s.prefix_start : s.prefix_end, s.start : s.end] for s in self.segments]
            key_rows = torch.from_numpy(np.concatenate(pieces).astype(np.int64)).to(self._device)
        cu_q = torch.tensor([0, *np.cumsum(q_lengths)], dtype=torch.int32, device=self._device)
        cu_k = torch.tensor([0, *np.cumsum(k_lengths)], dtype=torch.int32, device=self._device)
        return _Varlen(cu_q, cu_k, max(q_lengths), max(k_lengths), key_rows)

    def _build_tile(self, families: Sequence[Sequence[Segment]], window: int | None) -> _Tile:
        length = max(_size(family) for family in families)
        shape = (len(families), length)
        rows = np.zeros(shape, np.int64)
        own = np.full(shape, -1, np.int64)  # number of the segment in its family
        prefix = np.full(shape, -2, np.int64)  # number of the segment's prefix; matches nothing when there is none
        positions = np.zeros(shape, np.int64)
        for b, family in enumerate(families):
            at = 0
            for number, segment in enumerate(family):
                stop = at + segment.end - segment.start
                rows[b, at:stop] = np.arange(segment.start, segment.end)
                own[b, at:stop] = number
                prefix[b, at:stop] = 0 if segment.prefix_end > segment.prefix_start else -2
                positions[b, at:stop] = self._positions[segment.start : segment.end]
                at = stop
        seen = (own[:, :, None] == own[:, None, :]) | (prefix[:, :, None] == own[:, None, :])
        distance = positions[:, :, None] - positions[:, None, :]
        mask = seen & (distance >= 0) & (own >= 0)[:, :, None] & (own >= 0)[:, None, :]
        if window is not None:
            mask &= distance < window
        mask[:, :, 0] |= own < 0  # a softmax over nothing is NaN
        return _Tile(torch.from_numpy(rows).to(self._device), torch.from_numpy(mask[:, None]).to(self._device))


def register() -> None:
    """Make `PACKED_ATTENTION` known to transformers; harmless when repeated."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    attention_plan: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a packed micro-batch.

    query [1, H, T, D], key and value [1, K, T, D]; returns [1, T, H, D] and no weights. Raises ValueError without a
    plan, and for kinds of attention that it does not compute (soft caps, sinks).
    """
    if attention_plan is None:
        raise ValueError("packed attention needs the micro-batch's plan: pass attention_plan= to the model's forward")
    unknown = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(f"packed attention does not do {' or '.join(unknown)}, which {type(module).__name__} asks for")
    q_THD, k_TKD, v_TKD = (x[0].transpose(0, 1) for x in (query, key, value))
    if attention_plan.use_varlen:
        out_THD = _attend_varlen(attention_plan, q_THD, k_TKD, v_TKD, scaling, sliding_window)
    elif attention_plan.use_tiles:
        out_THD = _attend_tiles(attention_plan, q_THD, k_TKD, v_TKD, scaling, sliding_window)
    else:
        out_THD = _attend_segments(attention_plan, q_THD, k_TKD, v_TKD, scaling, sliding_window)
    return out_THD[None], None


def _attend_tiles(
    plan: AttentionPlan,
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    row_of_slot, slot_of_row, padded = plan.slots
    heads, repeats = q_THD.shape[1], q_THD.shape[1] // k_TKD.shape[1]
    tiles = plan.tiles(window)
    sizes = [tile.rows_BL.numel() for tile in tiles]
    q, k, v = (torch.split(_to_slots(x, row_of_slot, slot_of_row), sizes) for x in (q_THD, k_TKD, v_TKD))
    outs = []
    for tile, q_SHD, k_SKD, v_SKD in zip(tiles, q, k, v, strict=True):
        q_BHLD, k_BKLD, v_BKLD = (
            x.view(*tile.rows_BL.shape, *x.shape[1:]).transpose(1, 2) for x in (q_SHD, k_SKD, v_SKD)
        )
        out_BHLD = scaled_dot_product_attention(
            q_BHLD,
            k_BKLD.repeat_interleave(repeats, dim=1),
            v_BKLD.repeat_interleave(repeats, dim=1),
            attn_mask=tile.mask_B1LL,
            scale=scaling,
        )
        outs.append(out_BHLD.transpose(1, 2).reshape(-1, heads, q_SHD.shape[-1]))
    out_THD: torch.Tensor = _FromSlots.apply(torch.cat(outs), row_of_slot, slot_of_row, padded)  # type: ignore[no-untyped-call]
    return out_THD


def _attend_segments(
    plan: AttentionPlan,
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    lengths = [segment.end - segment.start for segment in plan.segments]
    number_by_start = {segment.start: number for number, segment in enumerate(plan.segments)}
    repeats = q_THD.shape[1] // k_TKD.shape[1]
    k_THD, v_THD = (x.repeat_interleave(repeats, dim=1) for x in (k_TKD, v_TKD))
    q, k, v = (torch.split(x, lengths) for x in (q_THD, k_THD, v_THD))
    outs = []
    for number, segment in enumerate(plan.segments):
        keys, values = k[number], v[number]
        prefix = segment.prefix_end - segment.prefix_start
        if prefix:
            owner = number_by_start[segment.prefix_start]
            keys, values = torch.cat([k[owner], keys]), torch.cat([v[owner], values])
        mask = None
        if prefix or (window is not None and window < len(keys)):
            mask = _lower_right_mask(len(q[number]), len(keys), window, q_THD.device)
        q_1HLD, k_1HLD, v_1HLD = (x.transpose(0, 1)[None] for x in (q[number], keys, values))
        out_1HLD = scaled_dot_product_attention(
            q_1HLD, k_1HLD, v_1HLD, attn_mask=mask, is_causal=mask is None, scale=scaling
        )
        outs.append(out_1HLD[0].transpose(0, 1))
    return torch.cat(outs)


def _attend_varlen(
    plan: AttentionPlan,
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds = plan.varlen
    if bounds.key_rows is not None:
        k_TKD, v_TKD = k_TKD[bounds.key_rows], v_TKD[bounds.key_rows]
    out = varlen_attn(
        q_THD.contiguous(),
        k_TKD.contiguous(),
        v_TKD.contiguous(),
        bounds.cu_q,
        bounds.cu_k,
        bounds.max_q,
        bounds.max_k,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q_THD.shape[1] != k_TKD.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out


class _ToSlots(torch.autograd.Function):
    """Rows to tile slots. Each row is in one slot, so its gradient is read back from there and nothing is summed."""

    @staticmethod
    def forward(ctx: Any, x_T: torch.Tensor, row_of_slot: torch.Tensor, slot_of_row: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(slot_of_row)
        return x_T.index_select(0, row_of_slot)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (slot_of_row,) = ctx.saved_tensors
        return grad.index_select(0, slot_of_row), None, None


def _to_slots(x_T: torch.Tensor, row_of_slot: torch.Tensor, slot_of_row: torch.Tensor) -> torch.Tensor:
    out_S: torch.Tensor = _ToSlots.apply(x_T, row_of_slot, slot_of_row)  # type: ignore[no-untyped-call]
    return out_S


class _FromSlots(torch.autograd.Function):
    """Tile slots back to rows; padded slots get gradient 0."""

    @staticmethod
    def forward(
        ctx: Any, x_S: torch.Tensor, row_of_slot: torch.Tensor, slot_of_row: torch.Tensor, padded: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(row_of_slot, padded)
        return x_S.index_select(0, slot_of_row)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        row_of_slot, padded = ctx.saved_tensors
        return grad.index_select(0, row_of_slot).index_fill_(0, padded, 0), None, None, None


def _lower_right_mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [queries, keys]; the last query sees every key, each earlier one a key less."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask if window is None else mask.triu(keys - queries - window + 1)


def _families(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments that attend to each other: a prefix, first, with those that use it."""
    families: dict[int, list[Segment]] = {}
    for segment in segments:
        head = segment.prefix_start if segment.prefix_end > segment.prefix_start else segment.start
        families.setdefault(head, []).append(segment)
    return list(families.values())


def _size(family: Sequence[Segment]) -> int:
    return sum(segment.end - segment.start for segment in family)


def _buckets(families: Sequence[Sequence[Segment]]) -> list[list[Sequence[Segment]]]:
    """Families of about the same size, so that little of a tile is padding."""
    buckets: dict[int, list[Sequence[Segment]]] = {}
    for family in families:
        buckets.setdefault(-(-_size(family) // TILE_ROUNDING), []).append(family)
    return [buckets[size] for size in sorted(buckets)]


def _valid_slots(tile: _Tile) -> torch.Tensor:
    """bool [B, L]: slots that hold a row. Only padded slots do not attend to themselves."""
    return tile.mask_B1LL[:, 0].diagonal(dim1=1, dim2=2)
