"""Parameters of a model by kind, and how tensor parallelism splits each kind."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

from miles.memory.model import ModelShape
from miles.memory.tensors import Tensors, layer_tensors, model_tensors, mtp_tensors, outer_tensors


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
    return counted(layer_tensors(shape, layer))


def outer_parameters(shape: ModelShape) -> Parameters:
    """Return those outside the layers: embedding, head and last norm."""
    return counted(outer_tensors(shape))


def mtp_parameters(shape: ModelShape) -> Parameters:
    """Return those of one MTP layer, without what it shares with the model."""
    return counted(mtp_tensors(shape))


def model_parameters(shape: ModelShape, *, mtp_layers: int = 0) -> Parameters:
    """Return those of the model with this many MTP layers."""
    return counted(model_tensors(shape, mtp_layers=mtp_layers))


def counted(tensors: Iterable[Tensors]) -> Parameters:
    """Return the elements of tensors by kind."""
    found: dict[str, int] = {}
    for each in tensors:
        found[each.kind] = found.get(each.kind, 0) + each.elements
    return Parameters(**found)


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
