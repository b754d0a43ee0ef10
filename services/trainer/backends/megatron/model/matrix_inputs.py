"""The modules of Megatron-Core whose inputs are multiplied by matrices that a recipe covers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from miles.precision.layers import layer_of
from miles.precision.recipe import Recipe
from miles.services.trainer.backends.megatron.precision.covered import weights

_NORMS_FIRST = "LayerNorm"
"""In the names of TransformerEngine's classes that norm their inputs before they multiply them."""


def matrix_inputs(recipe: Recipe, config: Any, tasks: Iterable[Any]) -> Iterator[tuple[int, torch.nn.Module]]:
    """Number of the layer, from 0, and module, each once, without those that norm their inputs themselves.

    `config` is Megatron-Core's TransformerConfig, and `tasks` are megatron-bridge's for the decoder's parameters.
    """
    seen: set[int] = set()
    for weight in weights(recipe, config, tasks):
        layer = layer_of(weight.name)
        known = id(weight.module) in seen or _NORMS_FIRST in type(weight.module).__name__
        if layer is not None and any(weight.covered) and not known:
            seen.add(id(weight.module))
            yield layer, weight.module
