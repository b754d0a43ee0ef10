"""Attention in plain PyTorch over packed or padded sequences, for layers without TransformerEngine.

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

from miles.services.trainer.backends.masked_attention import attend_last_rows

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
        """Query [L, H, D] or [L, 1, H, D], key and value likewise with K heads; returns [L, H · D of value].

        Of a padded micro-batch [M, S, H, D], for S samples of M rows; returns [M, S, H · D of value].
        """
        if packed_seq_params is None:
            columns = [self._last_rows(query[:, s], key[:, s], value[:, s]) for s in range(query.shape[1])]
            return torch.stack(columns, dim=1).flatten(2)
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
        parts = zip(torch.split(q, lengths), torch.split(k, lengths), torch.split(v, lengths), strict=True)
        return torch.cat([self._last_rows(*part) for part in parts])

    def _parts_of_sequences(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], rank: int, size: int
    ) -> torch.Tensor:
        """All-gather keys and values, and attend with this rank's two chunks of each sequence; see `rows`."""
        k, v = (gather_from_sequence_parallel_region(x.contiguous(), group=self._group) for x in (k, v))
        chunks = [length // (2 * size) for length in lengths for _ in range(2)]
        queries = torch.split(q, chunks)
        keys_by_rank, values_by_rank = ([torch.split(part, chunks) for part in x.chunk(size)] for x in (k, v))
        outs = []
        for i in range(len(lengths)):
            keys, values = (
                torch.cat([*(x[r][2 * i] for r in range(size)), *(x[r][2 * i + 1] for r in reversed(range(size)))])
                for x in (keys_by_rank, values_by_rank)
            )
            for part, chunk in ((queries[2 * i], rank), (queries[2 * i + 1], 2 * size - 1 - rank)):
                end = (chunk + 1) * len(part)
                outs.append(self._last_rows(part, keys[:end], values[:end]))
        return torch.cat(outs)

    def _last_rows(self, q_LHD: torch.Tensor, k_MKD: torch.Tensor, v_MKD: torch.Tensor) -> torch.Tensor:
        """Causal attention of the last L of M rows; [L, H, D]."""
        q, k, v = (x.transpose(0, 1)[None] for x in (q_LHD, k_MKD, v_MKD))
        attend = self._attend if self._cap is None else self._attend_capped
        sees_all = self._window is None or self._window >= len(k_MKD) - 1
        if self._cap is None and sees_all and len(q_LHD) == len(k_MKD):
            return self._attend(q, k, v, None)[0].transpose(0, 1)
        return attend_last_rows(attend, q, k, v, self._window)[0].transpose(0, 1)

    def _attend(
        self, q_1HLD: torch.Tensor, k_1KMD: torch.Tensor, v_1KMD: torch.Tensor, seen_LM: torch.Tensor | None
    ) -> torch.Tensor:
        """[1, H, L, D]; causal without `seen_LM`."""
        return torch.nn.functional.scaled_dot_product_attention(
            q_1HLD,
            k_1KMD,
            v_1KMD,
            attn_mask=seen_LM,
            is_causal=seen_LM is None,
            scale=self._scale,
            enable_gqa=q_1HLD.shape[1] != k_1KMD.shape[1],
        )

    def _attend_capped(
        self, q_1HLD: torch.Tensor, k_1KMD: torch.Tensor, v_1KMD: torch.Tensor, seen_LM: torch.Tensor
    ) -> torch.Tensor:
        """Softmax of capped scores in float32; [1, H, L, D]."""
        assert self._cap is not None
        shared = q_1HLD.shape[1] // k_1KMD.shape[1]
        k_1HMD, v_1HMD = (x.repeat_interleave(shared, dim=1) for x in (k_1KMD, v_1KMD))
        scores_1HLM = self._cap * torch.tanh(q_1HLD @ k_1HMD.transpose(2, 3) * self._scale / self._cap)
        weights_1HLM = torch.softmax(scores_1HLM.float().masked_fill(~seen_LM, -math.inf), dim=-1)
        return weights_1HLM.to(v_1HMD.dtype) @ v_1HMD
