"""A Hugging Face model that computes with quantised weights and inputs, as trainer and engines do by a recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from miles.precision.recipe import Recipe
from miles.precision.registry import weight_format
from miles.precision.rounding import as_matrices
from miles.precision.tensors import QuantisedTensors


class _RoundedInputs(TorchFunctionMode):
    """Rounds what is multiplied with weights in these storages."""

    def __init__(self, recipe: Recipe, storages: frozenset[int]) -> None:
        super().__init__()
        self._format = weight_format(recipe)
        self._storages = storages

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and args[1].untyped_storage().data_ptr() in self._storages:
            args = (self._format.rounded_rows(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def quantised(model: torch.nn.Module, recipe: Recipe, dtype: torch.dtype) -> Iterator[None]:
    """The model with the weights that its parts stand for, quantised from `dtype`, and with rounded inputs."""
    covers, codec = QuantisedTensors(recipe).covers, weight_format(recipe)
    chosen = {name: p for name, p in model.named_parameters() if covers(name, dtype, p.dim())}
    before = {name: parameter.detach().clone() for name, parameter in chosen.items()}
    storages = frozenset(parameter.untyped_storage().data_ptr() for parameter in chosen.values())
    with torch.no_grad():
        for name, parameter in chosen.items():
            parameter.copy_(codec.rounded(as_matrices(name, parameter.to(dtype))).view(parameter.shape))
        with _RoundedInputs(recipe, storages if recipe.rounds_inputs else frozenset()):
            yield
        for name, parameter in chosen.items():
            parameter.copy_(before[name])
