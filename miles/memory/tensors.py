"""A model's tensors, from its shape alone: names in the checkpoint form, shapes, and what kind of parameter each is.

Names are those of Llama, Qwen and DeepSeek; MiniMax-M2, Llama 4 and the MTP layers of MiMo have other ones for the same
tensors. Recipes cover tensors by names, of which they read the parts that these families share.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

from miles.memory.model import Latent, ModelShape


@dataclasses.dataclass(frozen=True, slots=True)
class Tensors:
    """Tensors of equal shape: one, or the same matrix of every routed expert of a layer."""

    kind: str
    """A field of `Parameters`."""
    name: str
    """Of the first one, without `.weight`."""
    shape: tuple[int, ...]
    count: int = 1
    always_float32: bool = False
    """Whether it is exported in float32 whatever the type of the others."""

    @property
    def elements(self) -> int:
        """Of all of them."""
        return self.count * math.prod(self.shape)


@functools.lru_cache(maxsize=1024)
def layer_tensors(shape: ModelShape, layer: int, named: int | None = None) -> tuple[Tensors, ...]:
    """Return those of one decoder layer, counted from 0; `named` is the number in the names where it is another."""
    at = f"model.layers.{layer if named is None else named}."
    mlp = _experts(shape) if layer in shape.expert_layers else _dense(shape)
    parts = [*attention_tensors(shape), *mlp]
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    parts += [Tensors("norms", name, (shape.hidden,)) for name in norms[: shape.norms]]
    return tuple(dataclasses.replace(part, name=at + part.name) for part in parts)


def attention_tensors(shape: ModelShape) -> Iterator[Tensors]:
    """Yield those of one layer's attention, with names inside the layer."""
    if shape.latent is not None:
        yield from _latent_attention(shape, shape.latent)
    else:
        yield from _plain_attention(shape)
    if shape.output_bias:
        yield Tensors("norms", "self_attn.o_proj.bias", (shape.hidden,))


def outer_tensors(shape: ModelShape) -> tuple[Tensors, ...]:
    """Return those outside the layers: embedding, head and last norm."""
    matrix = (shape.vocabulary, shape.hidden)
    head = () if shape.tied else (Tensors("head", "lm_head", matrix),)
    return (
        Tensors("embedding", "model.embed_tokens", matrix),
        *head,
        Tensors("norms", "model.norm", (shape.hidden,)),
    )


def mtp_tensors(shape: ModelShape, number: int = 0) -> tuple[Tensors, ...]:
    """Return those of one MTP layer, without what it shares with the model (DeepSeek-V3, arXiv 2412.19437)."""
    own, at = shape.layers + number, f"model.layers.{shape.layers + number}."
    return (
        *layer_tensors(shape, shape.layers - 1, own),
        Tensors("attention", f"{at}eh_proj", (shape.hidden, 2 * shape.hidden)),
        *(Tensors("norms", f"{at}{name}", (shape.hidden,)) for name in ("enorm", "hnorm", "shared_head.norm")),
    )


def model_tensors(shape: ModelShape, *, mtp_layers: int = 0) -> Iterator[Tensors]:
    """Yield those of the model with this many MTP layers."""
    yield from outer_tensors(shape)
    for layer in range(shape.layers):
        yield from layer_tensors(shape, layer)
    for number in range(mtp_layers):
        yield from mtp_tensors(shape, number)


def _plain_attention(shape: ModelShape) -> Iterator[Tensors]:
    at, hidden, dim = "self_attn.", shape.hidden, shape.head_dim
    query, keys = shape.heads * dim, shape.key_value_heads * dim
    yield Tensors("attention", f"{at}q_proj", (query, hidden))
    yield Tensors("key_values", f"{at}k_proj", (keys, hidden))
    yield Tensors("key_values", f"{at}v_proj", (keys, hidden))
    yield Tensors("attention", f"{at}o_proj", (hidden, query))
    if shape.query_bias:
        yield Tensors("attention", f"{at}q_proj.bias", (query,))
        yield Tensors("key_values", f"{at}k_proj.bias", (keys,))
        yield Tensors("key_values", f"{at}v_proj.bias", (keys,))
    if shape.query_key_norm is not None:
        sizes = (dim, dim) if shape.query_key_norm == "head" else (query, keys)
        for name, size in zip(("q_norm", "k_norm"), sizes, strict=True):
            yield Tensors("norms", f"{at}{name}", (size,))


def _latent_attention(shape: ModelShape, latent: Latent) -> Iterator[Tensors]:
    at, hidden, heads, rank = "self_attn.", shape.hidden, shape.heads, latent.query_rank
    queries = heads * (latent.nope_dim + latent.rope_dim)
    down = latent.key_value_rank + latent.rope_dim
    if rank is None:
        yield Tensors("attention", f"{at}q_proj", (queries, hidden))
    else:
        yield Tensors("replicated", f"{at}q_a_proj", (rank, hidden))
        yield Tensors("norms", f"{at}q_a_layernorm", (rank,))
        yield Tensors("attention", f"{at}q_b_proj", (queries, rank))
    yield Tensors("replicated", f"{at}kv_a_proj_with_mqa", (down, hidden))
    yield Tensors("norms", f"{at}kv_a_layernorm", (latent.key_value_rank,))
    width = heads * (latent.nope_dim + latent.value_dim)
    yield Tensors("attention", f"{at}kv_b_proj", (width, latent.key_value_rank))
    yield Tensors("attention", f"{at}o_proj", (hidden, heads * latent.value_dim))
    if shape.query_bias:
        for name, size in (("q_a_proj", rank or 0), ("kv_a_proj_with_mqa", down)):
            if size:
                yield Tensors("replicated", f"{at}{name}.bias", (size,))
    if latent.index_heads and latent.index_dim:
        index = f"{at}indexer."
        yield Tensors("attention", f"{index}wq_b", (latent.index_heads * latent.index_dim, rank or hidden))
        yield Tensors("attention", f"{index}wk", (latent.index_dim, hidden))
        yield Tensors("attention", f"{index}weights_proj", (latent.index_heads, hidden))
        yield Tensors("norms", f"{index}k_norm", (latent.index_dim,))
        yield Tensors("norms", f"{index}k_norm.bias", (latent.index_dim,))


def _dense(shape: ModelShape) -> Iterator[Tensors]:
    yield from _gated("dense", "mlp.", shape.hidden, shape.width)
    if shape.mlp_bias:
        for name, size in (("gate_proj", shape.width), ("up_proj", shape.width), ("down_proj", shape.hidden)):
            yield Tensors("dense", f"mlp.{name}.bias", (size,))


def _experts(shape: ModelShape) -> Iterator[Tensors]:
    yield from _gated("experts", "mlp.experts.0.", shape.hidden, shape.expert_width, shape.experts)
    yield Tensors("router", "mlp.gate", (shape.experts, shape.hidden))
    if shape.score_bias:
        yield Tensors("router", "mlp.gate.e_score_correction_bias", (shape.experts,), always_float32=True)
    if shape.shared_width:
        name = "mlp.shared_expert." if shape.shared_gate else "mlp.shared_experts."
        yield from _gated("shared", name, shape.hidden, shape.shared_width)
    if shape.shared_gate:
        yield Tensors("router", "mlp.shared_expert_gate", (1, shape.hidden))


def _gated(kind: str, at: str, hidden: int, width: int, count: int = 1) -> Iterator[Tensors]:
    yield Tensors(kind, f"{at}gate_proj", (width, hidden), count)
    yield Tensors(kind, f"{at}up_proj", (width, hidden), count)
    yield Tensors(kind, f"{at}down_proj", (hidden, width), count)
