"""Gives a Hugging Face model layers of rounded numbers, or refuses it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from miles.precision.emulation.experts import ExpertsRounding
from miles.precision.emulation.linear import RoundedLinear
from miles.precision.emulation.rounding import Rounding, RowRounding
from miles.precision.recipe import Recipe
from miles.precision.registry import weight_format

_EXPERTS = ("gate_up_proj", "down_proj")


class NotEmulated(ValueError):
    """A recipe covers a matrix of a model in a layer that cannot be computed with rounded numbers."""


def emulate(model: torch.nn.Module, recipe: Recipe, *, weights: bool, trained: bool = True) -> None:
    """Have the matrices that a recipe covers multiplied as its format holds them; parameters keep their names.

    Args:
        weights: Whether weights are rounded in every forward pass, from those in the modules; otherwise these are
            rounded already and inputs alone are, where the format rounds any.
        trained: Whether there are gradients; without, inputs that layers share are rounded once.

    Raises NotEmulated, before anything changed, naming covered matrices that are neither of linear layers nor of gated
    experts in the layout (experts, outputs, inputs), and ones that the format cannot hold.
    """
    layers = covered_layers(model, recipe)
    codec = weight_format(recipe)
    rounding = Rounding(codec, RowRounding(codec, shares=not trained) if recipe.rounds_inputs else None, weights)
    if rounding.inputs is None and not weights:
        return
    for name, layer in layers.items():
        module = layer.module
        if isinstance(module, torch.nn.Linear):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, RoundedLinear(module, rounding))
        else:
            gate_up, down = (rounding if each in layer.matrices else None for each in _EXPERTS)
            module.rounding = ExpertsRounding(gate_up, down)


@dataclasses.dataclass(frozen=True, slots=True)
class CoveredLayer:
    """A module with matrices that a recipe covers."""

    module: Any
    matrices: tuple[str, ...]
    """Names of these in the module."""


def covered_layers(model: torch.nn.Module, recipe: Recipe) -> dict[str, CoveredLayer]:
    """The layers that a recipe covers, by name. Raises NotEmulated; see `emulate`."""
    codec = weight_format(recipe)
    layers: dict[str, CoveredLayer] = {}
    faults: list[str] = []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        covered = tuple(each for each, weight in own.items() if recipe.layers.cover(f"{name}.{each}", weight.dim()))
        if not covered:
            continue
        layers[name] = CoveredLayer(module, covered)
        if (problem := _why_not(module)) is not None:
            faults.append(f"{name} {problem}")
            continue
        for each in covered:
            if (problem := codec.why_not(tuple(own[each].shape))) is not None:
                faults.append(f"{name}.{each}: {problem}")
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise NotEmulated(
            f"{type(model).__name__} cannot be computed in {recipe.format}: {'; '.join(faults[:3])}{more}; keep them "
            "out of the format with extra_high_precision_layers_hf"
        )
    return layers


def _why_not(module: Any) -> str | None:
    """Why the products of a module cannot be rounded; None when they can."""
    if type(module) is torch.nn.Linear:
        return None
    kind = type(module).__name__
    if not all(hasattr(module, each) for each in (*_EXPERTS, "has_gate")):
        return f"is a {kind}, not a linear layer"
    if not module.has_gate or module.has_bias or module.is_transposed or not module.is_concatenated:
        return f"({kind}) has experts with biases, transposed, interleaved, or without gates"
    return None
