"""Layers for machines without TransformerEngine: Megatron-Core's own, with attention and norms in plain PyTorch.

Megatron-Core's own attention takes neither packed sequences nor context parallelism, and its norm no sequence
parallelism; its layer specs have slots for both. Some families define their layers only with
TransformerEngine's parts; here they are built from local ones, with the same parameter names.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.bridge.models.conversion.param_mapping import AutoMapping
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm

from miles.services.trainer.backends.megatron.layers.all_heads_norm import key_norm, query_norm
from miles.services.trainer.backends.megatron.layers.local_attention import PackedAttention, Window, usual_window


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """Where a family's layers differ from the usual ones."""

    window: Window = usual_window
    query_norm: Any = None
    key_norm: Any = None
    attention: Any = SelfAttention
    norms_outputs: bool = False
    """Whether what attention and MLP add to the residual is normed."""


def local_spec_like(spec: Any) -> Callable[..., Any]:
    """A function that makes the local spec for a model whose spec of TransformerEngine layers is `spec`."""
    return functools.partial(local_block_spec, parts=_parts_like(spec))


def _parts_like(spec: Any) -> Parts:
    from megatron.bridge.models.gemma.gemma2_provider import gemma2_layer_spec
    from megatron.bridge.models.gemma.gemma3_provider import Gemma3SelfAttention, gemma3_layer_spec
    from megatron.bridge.models.minimax_m2.minimax_m2_provider import minimax_m2_layer_spec

    if spec is minimax_m2_layer_spec:
        return Parts(query_norm=query_norm, key_norm=key_norm)
    if spec is gemma2_layer_spec:
        return Parts(window=_every_other_layer, norms_outputs=True)
    if spec is gemma3_layer_spec:
        return Parts(window=_all_but_the_last_of_a_pattern, attention=Gemma3SelfAttention, norms_outputs=True)
    return Parts()


def local_block_spec(config: Any, vp_stage: int | None = None, *, parts: Parts) -> Any:
    """The spec of this stage's decoder layers, for a TransformerConfig. Raises ValueError for attention sinks."""
    if getattr(config, "softmax_type", "vanilla") != "vanilla":
        raise ValueError("attention sinks need TransformerEngine: install it, or train another model")
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=False,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
    )
    layers = [
        dataclasses.replace(spec, submodules=with_local_parts(spec.submodules, parts)) for spec in block.layer_specs
    ]
    return dataclasses.replace(block, layer_specs=layers, layer_norm=Norm)


def with_local_parts(submodules: Any, parts: Parts) -> Any:
    """The submodules with every norm, the core of attention and the family's own parts replaced by local ones."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(submodules):
        value = getattr(submodules, field.name)
        if field.name == "q_layernorm" and parts.query_norm is not None:
            changes[field.name] = parts.query_norm
        elif field.name == "k_layernorm" and parts.key_norm is not None:
            changes[field.name] = parts.key_norm
        elif field.name.endswith("norm") and value not in (IdentityOp, L2Norm, None):
            changes[field.name] = Norm
        elif value is DotProductAttention:
            changes[field.name] = ModuleSpec(module=PackedAttention, params={"window": parts.window})
        elif field.name in ("linear_proj", "linear_fc2") and parts.norms_outputs:
            changes[field.name] = NormedRowParallelLinear
        elif isinstance(value, ModuleSpec) and dataclasses.is_dataclass(value.submodules):
            module = parts.attention if value.module is SelfAttention else value.module
            changes[field.name] = dataclasses.replace(
                value, module=module, submodules=with_local_parts(value.submodules, parts)
            )
        elif isinstance(value, functools.partial) and dataclasses.is_dataclass(value.keywords.get("submodules")):
            inner = with_local_parts(value.keywords["submodules"], parts)
            changes[field.name] = functools.partial(value, submodules=inner)
    return dataclasses.replace(submodules, **changes)


def _every_other_layer(config: Any, layer_number: int) -> int | None:
    """Gemma 2 (arXiv 2408.00118): a window in the first layer, the third, and so on."""
    return config.window_size[0] if layer_number % 2 else None


def _all_but_the_last_of_a_pattern(config: Any, layer_number: int) -> int | None:
    """Gemma 3 (arXiv 2503.19786): five layers with a window, one without."""
    return config.window_size - 1 if layer_number % sum(config.interleaved_attn_pattern) else None


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


class NormedRowParallelLinear(RowParallelLinear):  # type: ignore[misc]
    """A row-parallel product whose output is normed."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **others: Any) -> None:
        super().__init__(input_size, output_size, config=config, **others)
        self.post_layernorm = Norm(config, output_size, eps=config.layernorm_epsilon)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output, and the bias left to add, which is None."""
        output, bias = super().forward(x)
        return self.post_layernorm(output), bias


AutoMapping.register_module_type(NormedRowParallelLinear.__name__, "row")
