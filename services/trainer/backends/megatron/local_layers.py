"""Layers for machines without TransformerEngine: Megatron-Core's own, with attention and norms in plain PyTorch.

Megatron-Core's own attention takes neither packed sequences nor context parallelism, and its norm no sequence
parallelism; its layer specs have slots for both.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm


def local_spec_like(spec: Any) -> Callable[..., Any]:
    """A function that makes the local spec for a model whose spec of TransformerEngine layers is `spec`."""
    from megatron.bridge.models.minimax_m2.minimax_m2_provider import FullDimKNorm, FullDimQNorm, minimax_m2_layer_spec

    if spec is minimax_m2_layer_spec:  # norms over all heads at once
        return functools.partial(local_block_spec, q_norm=FullDimQNorm, k_norm=FullDimKNorm)
    return local_block_spec


def local_block_spec(config: Any, vp_stage: int | None = None, *, q_norm: Any = None, k_norm: Any = None) -> Any:
    """The spec of this stage's decoder layers, for a TransformerConfig. Raises ValueError for what they lack.

    `q_norm` and `k_norm` build the norms of queries and keys where these are not of the usual kind.
    """
    if getattr(config, "window_size", None) is not None:
        raise ValueError("sliding-window attention needs TransformerEngine: install it, or train another model")
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=False,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
    )
    layers = [dataclasses.replace(spec, submodules=_with_our_parts(spec.submodules)) for spec in block.layer_specs]
    for layer in layers if q_norm is not None else ():
        attention = layer.submodules.self_attention
        attention.submodules = dataclasses.replace(attention.submodules, q_layernorm=q_norm, k_layernorm=k_norm)
    return dataclasses.replace(block, layer_specs=layers, layer_norm=Norm)


def _with_our_parts(submodules: Any) -> Any:
    """The submodules with every norm and the core of attention replaced."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(submodules):
        value = getattr(submodules, field.name)
        if field.name.endswith("layernorm") and value not in (IdentityOp, L2Norm, None):
            changes[field.name] = Norm
        elif value is DotProductAttention:
            changes[field.name] = PackedAttention
        elif isinstance(value, ModuleSpec) and dataclasses.is_dataclass(value.submodules):
            changes[field.name] = dataclasses.replace(value, submodules=_with_our_parts(value.submodules))
    return dataclasses.replace(submodules, **changes)


class Norm(torch.nn.Module):
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm (Ba et al. 2016), computed in float32."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self._centered = config.normalization == "LayerNorm"
        self._offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        self._eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size) - self._offset)
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size)) if self._centered else None
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Over the last dimension; of x's type."""
        wide = x.float()
        if self._centered:
            wide = wide - wide.mean(-1, keepdim=True)
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._eps)).to(x.dtype)
        scaled = normed * (self.weight + self._offset if self._offset else self.weight)
        return scaled if self.bias is None else scaled + self.bias


class PackedAttention(MegatronModule):  # type: ignore[misc]
    """softmax(q k scale) v within each sequence of a packed micro-batch, also when each rank holds a part of it.

    Dims: L local rows, M rows of all context-parallel ranks, H query heads, K key/value heads, D head size.
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
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self._scale = softmax_scale or 1.0 / math.sqrt(k_channels or config.kv_channels)
        self._group = parallel_state.get_context_parallel_group() if pg_collection is None else pg_collection.cp

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
            out_LHD = self._whole_sequences(q_LHD, k_LKD, v_LKD, lengths)
        else:
            out_LHD = self._parts_of_sequences(q_LHD, k_LKD, v_LKD, lengths, rank, size)
        out = out_LHD.flatten(1)
        return out.unsqueeze(1) if query.dim() == 4 else out

    def _whole_sequences(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        parts = zip(torch.split(q, lengths), torch.split(k, lengths), torch.split(v, lengths), strict=True)
        return torch.cat([self._attend(*part, None) for part in parts])

    def _parts_of_sequences(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], rank: int, size: int
    ) -> torch.Tensor:
        """Every rank gathers all keys and values, and attends with the rows that it holds."""
        k, v = (gather_from_sequence_parallel_region(x.contiguous(), group=self._group) for x in (k, v))
        local = [length // size for length in lengths]
        keys_by_rank = [torch.split(part, local) for part in k.chunk(size)]
        values_by_rank = [torch.split(part, local) for part in v.chunk(size)]
        outs = []
        for i, (part, length) in enumerate(zip(torch.split(q, local), lengths, strict=True)):
            positions = [_positions(length, r, size, q.device) for r in range(size)]
            seen_LM = torch.cat(positions)[None] <= positions[rank][:, None]
            keys, values = (torch.cat([by_rank[i] for by_rank in x]) for x in (keys_by_rank, values_by_rank))
            outs.append(self._attend(part, keys, values, seen_LM))
        return torch.cat(outs)

    def _attend(
        self, q_LHD: torch.Tensor, k_MKD: torch.Tensor, v_MKD: torch.Tensor, seen_LM: torch.Tensor | None
    ) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q_LHD, k_MKD, v_MKD))
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
