"""Layers of Megatron-Core that multiply rounded weights, and rounded inputs where the format rounds any.

A layer of a model that is built already gets a subclass of its class, as `torch.distributed.fsdp.fully_shard` does it:
Megatron-Core takes no other classes in the specs of some layers.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.bridge.models.conversion.param_mapping import AutoMapping
from megatron.core.extensions import transformer_engine as engine
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from miles.services.trainer.backends.megatron.precision.rounding import ParameterRounding

_LOCAL = {ColumnParallelLinear: "column", RowParallelLinear: "row"}
_ENGINE = {
    "TELayerNormColumnParallelLinear": "column",
    "TEColumnParallelLinear": "column",
    "TEColumnParallelGroupedLinear": "column",
    "TERowParallelLinear": "row",
    "TERowParallelGroupedLinear": "row",
    "TELinear": "replicated",  # whose subclasses come first
}
"""How ranks share the weights of layers, for megatron-bridge."""


def round_in(module: Any, attribute: str, rounding: ParameterRounding) -> bool:
    """Have a layer multiply by what `rounding` makes of its parameter; False when it is of another kind."""
    if not hasattr(module, "roundings"):
        plain: type = type(module)
        kind = _rounded(plain)
        if kind is None:
            return False
        module.__class__ = kind
        module.roundings = {}
    module.roundings[attribute] = rounding
    return True


class _RoundedLocal:
    """Before Megatron-Core's own layer, whose product is `_forward_impl`."""

    roundings: dict[str, ParameterRounding]
    """By name of the parameter."""

    def _forward_impl(self, *arguments: Any, **others: Any) -> torch.Tensor:
        if (rounding := self.roundings.get("weight")) is not None:
            others |= {"input": rounding.inputs(others["input"]), "weight": rounding.weight(others["weight"])}
        product: torch.Tensor = super()._forward_impl(*arguments, **others)  # type: ignore[misc]
        return product


class _RoundedEngine:
    """Before TransformerEngine's layer, which asks `_get_weight_tensors` for what it multiplies; inputs are its own."""

    roundings: dict[str, ParameterRounding]
    """By name of the parameter; layers of experts have one for each."""

    def _get_weight_tensors(self) -> list[torch.Tensor]:
        held: list[torch.Tensor] = super()._get_weight_tensors()  # type: ignore[misc]
        names = [f"weight{i}" for i in range(len(held))] if hasattr(self, "num_gemms") else ["weight"]
        found = zip(held, map(self.roundings.get, names), strict=True)
        return [weight if rounding is None else rounding.weight(weight) for weight, rounding in found]


@functools.cache
def _rounded(kind: type) -> type | None:
    """The class that rounds for layers of a class; None for other parts of models."""
    for base, shared in _LOCAL.items():
        if issubclass(kind, base):
            return _made(_RoundedLocal, kind, shared)
    for name, shared in _ENGINE.items() if engine.HAVE_TE else ():
        if issubclass(kind, getattr(engine, name)):
            return _made(_RoundedEngine, kind, shared)
    return None


def _made(before: type, kind: type, shared: str) -> type:
    made = type(f"Rounded{kind.__name__}", (before, kind), {"__doc__": before.__doc__})
    AutoMapping.register_module_type(made.__name__, shared)
    return made
