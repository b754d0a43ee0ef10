"""Attention over a packed micro-batch: rows see their own segment and its prefix, never another sample.

`PACKED_ATTENTION` is registered with transformers' `AttentionInterface`; the plan of the micro-batch reaches it as the
keyword argument `attention_plan` of the model's forward. Three ways to compute the same thing:

- tiles: each segment's queries, and the keys that they see, are gathered into padded blocks; many short samples take
  few matrix products (`tiles`, and on every device that lacks the next);
- varlen: PyTorch's variable-length flash attention (CUDA, bfloat16 or float16);
- segments: one call of scaled_dot_product_attention per segment, for samples whose scores would be too large to keep.

Dims: T rows, S slots of keys, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from miles.algorithms.device_copies import to_device
from miles.services.trainer.backends.fsdp.attention.slots import Slots, slots_of, to_slots
from miles.services.trainer.backends.fsdp.attention.tiles import TilePlan, attend_tiles, capped, fits_tiles
from miles.services.trainer.backends.masked_attention import attend_last_rows
from miles.services.trainer.batch.packing import Segment, seen_rows

PACKED_ATTENTION = "miles_packed"
_HEAD_MULTIPLE = 8
"""Head sizes of the variable-length kernel are multiples of this."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Varlen:
    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    """Upper bound of a segment's rows; a power of two, so that few values occur. 1 would be a constant to compilers."""
    max_k: int
    """The same of what a segment sees."""


class AttentionPlan:
    """How to compute attention for one micro-batch; built once and used by every layer."""

    def __init__(
        self, segments: Sequence[Segment], device: torch.device, dtype: torch.dtype, *, varlen: bool | None = None
    ) -> None:
        """`segments`: those of the micro-batch, in row order, without gaps. `varlen`: use variable-length kernels; None
        where they run. Raises ValueError when they do not run here."""
        self.segments = tuple(segments)
        self.device = device
        can_varlen = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
        if varlen and not can_varlen:
            raise ValueError(
                f"attn_implementation varlen needs CUDA and 16-bit numbers, not {dtype} on {device.type}; set auto"
            )
        self.use_varlen = can_varlen if varlen is None else varlen
        self.use_tiles = fits_tiles(self.segments)
        """Where variable-length kernels are not used."""
        self._tiles: dict[int | None, TilePlan] = {}

    def tiles(self, window: int | None) -> TilePlan:
        """Tiles under a sliding window of so many rows; None for full attention."""
        if window not in self._tiles:
            self._tiles[window] = TilePlan(self.segments, window, self.device)
        return self._tiles[window]

    @functools.cached_property
    def keys(self) -> Slots | None:
        """The rows that each segment sees, segment after segment; None when those are all rows in order."""
        return self._key_slots() if any(segment.prefix for segment in self.segments) else None

    def complete(self) -> None:
        """Compute what layers would ask for, in a form that is the same for every micro-batch: the compiler traces a
        layer once, and cannot trace this."""
        self.keys = self.keys or self._key_slots()
        self.varlen  # noqa: B018  (computed and kept)

    def _key_slots(self) -> Slots:
        return slots_of(seen_rows(self.segments), self.segments[-1].end, self.device)

    @functools.cached_property
    def varlen(self) -> _Varlen:
        """Sequence bounds for variable-length kernels, whose causal mask is aligned at the lower right."""
        q_lengths = [segment.rows for segment in self.segments]
        k_lengths = [segment.prefix_rows + segment.rows for segment in self.segments]
        bounds = torch.from_numpy(np.cumsum([[0, *q_lengths], [0, *k_lengths]], axis=1).astype(np.int32))
        cu_q, cu_k = to_device(bounds, self.device)
        return _Varlen(cu_q, cu_k, _power_of_two(max(q_lengths)), _power_of_two(max(k_lengths)))


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
    softcap: float | None = None,
    attention_plan: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a packed micro-batch; a soft cap c bounds scores to c tanh(score / c).

    query [1, H, T, D], key [1, K, T, D], value [1, K, T, V]; returns [1, T, H, V] and no weights. Raises ValueError
    without a plan, and for kinds of attention that it does not compute: sinks, and samples that are longer than the
    number of rows that an indexer chooses for each.
    """
    if attention_plan is None:
        raise ValueError("packed attention needs the micro-batch's plan: pass attention_plan= to the model's forward")
    _refuse_others(module, attention_plan, kwargs)
    fits_kernel = softcap is None and query.shape[-1] % _HEAD_MULTIPLE == 0  # it has no soft cap
    use_varlen = attention_plan.use_varlen and fits_kernel
    use_tiles = not use_varlen and attention_plan.use_tiles
    # Unlike x[0], squeeze has a view for a gradient.
    q_THD, k_SKD, v_SKD = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if attention_plan.keys is not None and not use_tiles:
        k_SKD, v_SKD = (to_slots(x_TKD, attention_plan.keys) for x_TKD in (k_SKD, v_SKD))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if use_varlen:
        out_THD = _attend_varlen(attention_plan.varlen, q_THD, k_SKD, v_SKD, scale, sliding_window)
    elif use_tiles:
        out_THD = attend_tiles(attention_plan.tiles(sliding_window), q_THD, k_SKD, v_SKD, scale, softcap)
    else:
        out_THD = _attend_segments(attention_plan.segments, q_THD, k_SKD, v_SKD, scale, sliding_window, softcap)
    return out_THD[None], None


def _refuse_others(module: torch.nn.Module, plan: AttentionPlan, arguments: dict[str, Any]) -> None:
    if arguments.get("s_aux") is not None:
        raise ValueError(f"packed attention does not do s_aux, which {type(module).__name__} asks for")
    chosen: torch.Tensor | None = arguments.get("indices")  # by the indexer of DeepSeek-V3.2: all rows of short samples
    if chosen is None:
        return
    longest = max(segment.prefix_rows + segment.rows for segment in plan.segments)
    if longest > chosen.shape[-1]:
        raise ValueError(
            f"packed attention sees whole samples, and a row of {type(module).__name__} only {chosen.shape[-1]} of "
            f"{longest} others; set rollout_max_context_len to at most {chosen.shape[-1]}"
        )


def _attend_segments(
    segments: Sequence[Segment],
    q_THD: torch.Tensor,
    k_SKD: torch.Tensor,
    v_SKD: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    shares_heads = q_THD.shape[1] != k_SKD.shape[1]
    if shares_heads and (softcap is not None or q_THD.device.type != "cpu"):  # kernels that keep no scores want it too
        repeats = q_THD.shape[1] // k_SKD.shape[1]
        k_SKD, v_SKD = (x.repeat_interleave(repeats, dim=1) for x in (k_SKD, v_SKD))
        shares_heads = False
    attend = (
        functools.partial(_attend, scale=scale, enable_gqa=shares_heads)
        if softcap is None
        else functools.partial(_attend_capped, scale=scale, softcap=softcap)
    )
    queries = torch.split(q_THD, [segment.rows for segment in segments])
    lengths = [segment.prefix_rows + segment.rows for segment in segments]
    outs = []
    for part in zip(queries, torch.split(k_SKD, lengths), torch.split(v_SKD, lengths), strict=True):
        q_1HLD, k_1KMD, v_1KMD = (x.transpose(0, 1)[None] for x in part)
        rows, keys = q_1HLD.shape[2], k_1KMD.shape[2]
        if softcap is None and rows == keys and (window is None or window >= keys):
            out_1HLD = attend(q_1HLD, k_1KMD, v_1KMD, None)
        else:
            back = None if window is None else window - 1
            out_1HLD = attend_last_rows(attend, q_1HLD, k_1KMD, v_1KMD, back)
        outs.append(out_1HLD[0].transpose(0, 1))
    return torch.cat(outs)


def _attend_capped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, *, scale: float, softcap: float
) -> torch.Tensor:
    """The same with soft-capped scores; as many heads of keys as of queries."""
    scores = capped(torch.matmul(q, k.transpose(-1, -2)) * scale, softcap)
    return torch.matmul(scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None, *, scale: float, enable_gqa: bool
) -> torch.Tensor:
    """One segment's attention; causal without `seen`."""
    return scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=enable_gqa
    )


def _attend_varlen(
    bounds: _Varlen,
    q_THD: torch.Tensor,
    k_SKD: torch.Tensor,
    v_SKD: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q_THD.contiguous(),
        k_SKD.contiguous(),
        v_SKD.contiguous(),
        bounds.cu_q,
        bounds.cu_k,
        bounds.max_q,
        bounds.max_k,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q_THD.shape[1] != k_SKD.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out


def _power_of_two(length: int) -> int:
    """The smallest one that is at least the length, and 16."""
    return 1 << (max(length, 16) - 1).bit_length()
