"""TransformerEngine's layers with rounded weights, for formats that leave inputs as they are (INT4)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.bridge.models.conversion.param_mapping import AutoMapping
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TELinear,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)

from miles.services.trainer.backends.megatron.precision.rounding import Roundings

_SPLITS = {
    TELayerNormColumnParallelLinear: "column",
    TEColumnParallelLinear: "column",
    TEColumnParallelGroupedLinear: "column",
    TERowParallelLinear: "row",
    TERowParallelGroupedLinear: "row",
    TELinear: "replicated",  # the others of its subclasses come first
}


class _Rounded:
    """Before the layer, which asks `_get_weight_tensors` for what it multiplies."""

    def __init__(self, *arguments: Any, **others: Any) -> None:
        self.roundings: Roundings = {}  # first: layers look at their weights while they are built
        super().__init__(*arguments, **others)

    def _get_weight_tensors(self) -> list[torch.Tensor]:
        held: list[torch.Tensor] = super()._get_weight_tensors()  # type: ignore[misc]
        if not self.roundings:
            return held
        names = ["weight"] if len(held) == 1 and hasattr(self, "weight") else [f"weight{i}" for i in range(len(held))]
        found = zip(held, map(self.roundings.get, names), strict=True)
        return [weight if rounding is None else rounding.weight(weight) for weight, rounding in found]


@functools.cache
def rounded_layer(kind: type) -> type:
    """The class that can round what a layer of this class multiplies; classes of other parts are returned as is."""
    for base, split in _SPLITS.items():
        if issubclass(kind, base):
            made = type(f"Rounded{kind.__name__}", (_Rounded, kind), {"__doc__": _Rounded.__doc__})
            AutoMapping.register_module_type(made.__name__, split)
            return made
    return kind
