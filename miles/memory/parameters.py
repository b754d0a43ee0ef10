"""Parameters of a model by kind, and how tensor parallelism splits each kind."""

from __future__ import annotations

import dataclasses
import functools

from miles.memory.model import ModelShape


@dataclasses.dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of parameters, persistent buffers included."""

    embedding: int = 0
    head: int = 0
    """0 when it is the embedding."""
    attention: int = 0
    """What tensor parallelism splits; keys and values apart."""
    key_values: int = 0
    """Key and value projections: split over at most as many ranks as there are key/value heads."""
    replicated: int = 0
    """Projections to latent vectors and from MTP inputs' halves: every tensor-parallel rank has all of them."""
    dense: int = 0
    """MLPs of layers without experts."""
    experts: int = 0
    """Routed experts."""
    shared: int = 0
    """Shared experts."""
    router: int = 0
    norms: int = 0
    """Norms, and biases that every tensor-parallel rank has all of."""

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def values(self) -> tuple[int, ...]:
        """Return the numbers in the order of the fields."""
        return tuple(getattr(self, field.name) for field in _FIELDS)

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.values())

    def split(self, tensor: int, key_value_heads: int) -> Parameters:
        """Return what the largest of `tensor` ranks has of everything but experts, which are split otherwise."""
        kinds = ("embedding", "head", "attention", "dense", "shared")
        split = {kind: -(-getattr(self, kind) // tensor) for kind in kinds}
        return dataclasses.replace(self, **split, key_values=-(-self.key_values // min(tensor, key_value_heads)))


_FIELDS = dataclasses.fields(Parameters)


@functools.lru_cache(maxsize=4096)
def layer_parameters(shape: ModelShape, layer: int) -> Parameters:
    """Return those of one decoder layer, counted from 0."""
    found = attention_parameters(shape) + Parameters(norms=shape.norms * shape.hidden)
    if layer not in shape.expert_layers:
        bias = (2 * shape.width + shape.hidden) if shape.mlp_bias else 0
        return found + Parameters(dense=3 * shape.hidden * shape.width + bias)
    return found + Parameters(
        experts=shape.experts * 3 * shape.hidden * shape.expert_width,
        shared=3 * shape.hidden * shape.shared_width,
        router=shape.experts * (shape.hidden + shape.score_bias) + shape.shared_gate * shape.hidden,
    )


def attention_parameters(shape: ModelShape) -> Parameters:
    """Return those of one layer's attention."""
    hidden, heads, groups, dim = shape.hidden, shape.heads, shape.key_value_heads, shape.head_dim
    output_bias = shape.output_bias * hidden
    if (latent := shape.latent) is not None:
        width = latent.nope_dim + latent.rope_dim
        down = hidden * (latent.key_value_rank + latent.rope_dim) + hidden * (latent.query_rank or 0)
        bias = shape.query_bias * (latent.key_value_rank + latent.rope_dim + (latent.query_rank or 0))
        up = (latent.query_rank or hidden) * heads * width
        up += latent.key_value_rank * heads * (latent.nope_dim + latent.value_dim)
        index_width = latent.index_heads * latent.index_dim
        index = (latent.query_rank or hidden) * index_width + hidden * (latent.index_dim + latent.index_heads)
        return Parameters(
            attention=up + heads * latent.value_dim * hidden + index * (index_width > 0),
            replicated=down + bias,
            norms=latent.key_value_rank + (latent.query_rank or 0) + output_bias + 2 * latent.index_dim,
        )
    norms = {None: 0, "head": 2 * dim, "all": (heads + groups) * dim}[shape.query_key_norm]
    return Parameters(
        attention=2 * hidden * heads * dim + shape.query_bias * heads * dim,
        key_values=2 * groups * dim * (hidden + shape.query_bias),
        norms=norms + output_bias,
    )


def outer_parameters(shape: ModelShape) -> Parameters:
    """Return those outside the layers: embedding, head and last norm."""
    matrix = shape.vocabulary * shape.hidden
    return Parameters(embedding=matrix, head=0 if shape.tied else matrix, norms=shape.hidden)


def mtp_parameters(shape: ModelShape) -> Parameters:
    """Return those of one MTP layer, without what it shares with the model (DeepSeek-V3, arXiv 2412.19437)."""
    inputs = Parameters(attention=2 * shape.hidden * shape.hidden, norms=3 * shape.hidden)
    return layer_parameters(shape, shape.layers - 1) + inputs


def model_parameters(shape: ModelShape, *, mtp_layers: int = 0) -> Parameters:
    """Return those of the model with this many MTP layers."""
    found = outer_parameters(shape)
    for layer in range(shape.layers):
        found += layer_parameters(shape, layer)
    for _ in range(mtp_layers):
        found += mtp_parameters(shape)
    return found


def active_parameters(shape: ModelShape) -> int:
    """Return those that compute a token: of the routed experts, the chosen ones."""
    found = model_parameters(shape)
    idle = found.experts * (shape.experts - shape.experts_per_token) // shape.experts if shape.experts else 0
    return found.total - idle


def key_value_elements(shape: ModelShape) -> int:
    """Return the elements of a token in a KV cache of all layers; latent attention caches its latent vector."""
    if shape.latent is not None:
        return shape.layers * (shape.latent.key_value_rank + shape.latent.rope_dim)
    return shape.layers * 2 * shape.key_value_heads * shape.head_dim
