"""Megatron-Core's own parallel layers, multiplying rounded weights and inputs where a recipe covers them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.bridge.models.conversion.param_mapping import AutoMapping
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from miles.services.trainer.backends.megatron.precision.rounding import Roundings

_SPLITS = {ColumnParallelLinear: "column", RowParallelLinear: "row"}


class _Rounded:
    """Before the layer: its product, `_forward_impl`, takes what it multiplies."""

    def __init__(self, *arguments: Any, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self.roundings: Roundings = {}

    def _forward_impl(self, *arguments: Any, **others: Any) -> torch.Tensor:
        rounding = self.roundings.get("weight")
        if rounding is not None:
            others |= {"input": rounding.inputs(others["input"]), "weight": rounding.weight(others["weight"])}
        product: torch.Tensor = super()._forward_impl(*arguments, **others)  # type: ignore[misc]
        return product


@functools.cache
def rounded_layer(kind: type) -> type:
    """The class that can round what a layer of this class multiplies; classes of other parts are returned as is."""
    for base, split in _SPLITS.items():
        if issubclass(kind, base):
            made = type(f"Rounded{kind.__name__}", (_Rounded, kind), {"__doc__": _Rounded.__doc__})
            AutoMapping.register_module_type(made.__name__, split)
            return made
    return kind
