"""Attention in plain PyTorch over packed sequences, for layers without TransformerEngine.

Dims: L local rows, M rows of all context-parallel ranks, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention

Window = Callable[[Any, int], int | None]
"""From a TransformerConfig and the number of a layer (from 1): how many rows back its rows see; None for all."""


def usual_window(config: Any, layer_number: int) -> int | None:
    """The window of Megatron-Core's settings."""
    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        return None
    back: int = config.window_size[0]
    return None if back < 0 else back


class PackedAttention(MegatronModule):  # type: ignore[misc]
    """softmax(q k scale) v within each sequence of a packed micro-batch, also when each rank holds a part of it.

    A layer may see a window of rows alone, and a model may bound its scores by a soft cap c: c tanh(score / c).
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        pg_collection: Any = None,
        window: Window = usual_window,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        head_size = getattr(config, "query_pre_attn_scalar", None) or k_channels or config.kv_channels
        self._scale = softmax_scale or 1.0 / math.sqrt(head_size)
        self._group = parallel_state.get_context_parallel_group() if pg_collection is None else pg_collection.cp
        self._window = window(config, layer_number)
        self._cap: float | None = getattr(config, "attn_logit_softcapping", None)

    def forward(
        self, query: Any, key: Any, value: Any, attention_mask: Any, packed_seq_params: Any = None, **_: Any
    ) -> torch.Tensor:
        """Query [L, H, D] or [L, 1, H, D], key and value likewise with K heads; returns [L, H · D of value]."""
        if packed_seq_params is None:
            raise ValueError("attention needs packed sequences: pass packed_seq_params with the batch")
        q_LHD, k_LKD, v_LKD = (x.squeeze(1) if x.dim() == 4 else x for x in (query, key, value))
        starts = packed_seq_params.cu_seqlens_q.tolist()
        lengths = [end - start for start, end in itertools.pairwise(starts)]
        size, rank = self._group.size(), self._group.rank()
        if size == 1:
            out_LHD = self._full_sequences(q_LHD, k_LKD, v_LKD, lengths)
        else:
            out_LHD = self._parts_of_sequences(q_LHD, k_LKD, v_LKD, lengths, rank, size)
        out = out_LHD.flatten(1)
        return out.unsqueeze(1) if query.dim() == 4 else out

    def _full_sequences(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        outs = []
        for part in zip(torch.split(q, lengths), torch.split(k, lengths), torch.split(v, lengths), strict=True):
            length = len(part[0])
            plain = self._cap is None and (self._window is None or self._window >= length - 1)
            positions = torch.arange(length, device=q.device)
            outs.append(self._attend(*part, None if plain else self._seen(positions, positions)))
        return torch.cat(outs)

    def _parts_of_sequences(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], rank: int, size: int
    ) -> torch.Tensor:
        """All-gather keys and values, and attend with the rows of this rank."""
        k, v = (gather_from_sequence_parallel_region(x.contiguous(), group=self._group) for x in (k, v))
        local = [length // size for length in lengths]
        keys_by_rank = [torch.split(part, local) for part in k.chunk(size)]
        values_by_rank = [torch.split(part, local) for part in v.chunk(size)]
        outs = []
        for i, (part, length) in enumerate(zip(torch.split(q, local), lengths, strict=True)):
            positions = [_positions(length, r, size, q.device) for r in range(size)]
            seen_LM = self._seen(positions[rank], torch.cat(positions))
            keys, values = (torch.cat([by_rank[i] for by_rank in x]) for x in (keys_by_rank, values_by_rank))
            outs.append(self._attend(part, keys, values, seen_LM))
        return torch.cat(outs)

    def _seen(self, queries_L: torch.Tensor, keys_M: torch.Tensor) -> torch.Tensor:
        """Which keys each query sees, by their positions in the sequence; bool [L, M]."""
        back_LM = queries_L[:, None] - keys_M[None]
        return (back_LM >= 0) if self._window is None else (back_LM >= 0) & (back_LM <= self._window)

    def _attend(
        self, q_LHD: torch.Tensor, k_MKD: torch.Tensor, v_MKD: torch.Tensor, seen_LM: torch.Tensor | None
    ) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q_LHD, k_MKD, v_MKD))
        if self._cap is not None:
            assert seen_LM is not None
            return self._attend_capped(q[0], k[0], v[0], seen_LM, self._cap).transpose(0, 1)
        out_1HLD = torch.nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=seen_LM,
            is_causal=seen_LM is None,
            scale=self._scale,
            enable_gqa=q_LHD.shape[1] != k_MKD.shape[1],
        )
        return out_1HLD[0].transpose(0, 1)

    def _attend_capped(
        self, q_HLD: torch.Tensor, k_KMD: torch.Tensor, v_KMD: torch.Tensor, seen_LM: torch.Tensor, cap: float
    ) -> torch.Tensor:
        """Softmax in float32; [H, L, D]."""
        shared = q_HLD.shape[0] // k_KMD.shape[0]
        k_HMD, v_HMD = (x.repeat_interleave(shared, dim=0) for x in (k_KMD, v_KMD))
        scores_HLM = cap * torch.tanh(q_HLD @ k_HMD.transpose(1, 2) * self._scale / cap)
        weights_HLM = torch.softmax(scores_HLM.float().masked_fill(~seen_LM, -math.inf), dim=-1)
        return weights_HLM.to(v_HMD.dtype) @ v_HMD


def _positions(length: int, rank: int, size: int, device: torch.device) -> torch.Tensor:
    """Positions in its sequence of the rows that a context-parallel rank holds; see `rows`."""
    chunk = length // (2 * size)
    back = 2 * size - 1 - rank
    return torch.cat(
        [
            torch.arange(rank * chunk, (rank + 1) * chunk, device=device),
            torch.arange(back * chunk, (back + 1) * chunk, device=device),
        ]
    )
