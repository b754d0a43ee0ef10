"""The modules of a Hugging Face model whose inputs are multiplied by matrices that a recipe covers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from miles.precision.layers import layer_of
from miles.precision.recipe import Recipe

_GATES_AND_UPS = "gate_up_proj"


def matrix_inputs(model: torch.nn.Module, recipe: Recipe) -> Iterator[tuple[int, torch.nn.Module]]:
    """Layer and module: linear ones, and the experts of a layer, of whose second matrix inputs are not seen."""
    for name, module in model.named_modules():
        layer = layer_of(f"{name}.")
        if layer is None:
            continue
        own = dict(module.named_parameters(recurse=False))
        part = "weight" if isinstance(module, torch.nn.Linear) else _GATES_AND_UPS
        if part in own and recipe.layers.cover(f"{name}.{part}", own[part].dim()):
            yield layer, module
