"""RMSNorm of queries and keys over all heads at once (MiniMax-M2), where tensor parallelism gives each rank some heads.

megatron-bridge's own holds a part of the weight on each rank and sums squares over ranks outside of autograd: its
gradient lacks what other ranks' outputs owe to this rank's heads, and Megatron-Core, which adds up the gradients of
q_layernorm and k_layernorm over tensor-parallel ranks as those of replicated weights, would add up different parts.
Here every rank holds the whole weight, multiplies by the part of its heads, and sums squares within autograd.

Dims: S rows, B = 1, H heads of this rank, D head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)


class AllHeadsNorm(torch.nn.Module):
    """w · x / sqrt(mean of x² over all heads + eps) (Zhang and Sennrich 2019), computed in float32."""

    def __init__(self, heads: int, head_size: int, config: Any, eps: float) -> None:
        super().__init__()
        self._eps = eps
        self._group = parallel_state.get_tensor_model_parallel_group()
        self._copies = max(1, self._group.size() // heads)
        """Ranks that hold the same head: there are more ranks than key/value heads."""
        self.weight = torch.nn.Parameter(torch.ones(heads * head_size, dtype=config.params_dtype))

    def forward(self, x_SBHD: torch.Tensor) -> torch.Tensor:
        """Of x's shape and type."""
        wide = x_SBHD.float().flatten(2)
        # Every rank's output depends on the sum, so its gradient is summed over ranks too.
        squares = reduce_from_tensor_model_parallel_region(wide.pow(2).sum(-1, keepdim=True), group=self._group)
        squares = copy_to_tensor_model_parallel_region(squares, group=self._group) / self._copies
        normed = wide * torch.rsqrt(squares / self.weight.numel() + self._eps)
        first = self._group.rank() // self._copies * wide.shape[-1]
        scaled = normed.to(x_SBHD.dtype) * self.weight[first : first + wide.shape[-1]]
        return scaled.view_as(x_SBHD)


def query_norm(hidden_size: int, config: Any, eps: float) -> AllHeadsNorm:
    """Of the queries; `hidden_size` is that of a head. For the slot of a layer's spec."""
    return AllHeadsNorm(config.num_attention_heads, hidden_size, config, eps)


def key_norm(hidden_size: int, config: Any, eps: float) -> AllHeadsNorm:
    """Of the keys."""
    return AllHeadsNorm(config.num_query_groups or config.num_attention_heads, hidden_size, config, eps)


def with_all_heads_norms(spec: Callable[..., Any]) -> Callable[..., Any]:
    """The function that makes a layer's spec, with these norms in its attention."""

    def changed(config: Any) -> Any:
        layer = spec(config)
        attention = layer.submodules.self_attention
        parts = dataclasses.replace(attention.submodules, q_layernorm=query_norm, k_layernorm=key_norm)
        submodules = dataclasses.replace(
            layer.submodules, self_attention=dataclasses.replace(attention, submodules=parts)
        )
        return dataclasses.replace(layer, submodules=submodules)

    return changed
