"""Decoder layers compiled by torch.compile: one graph for all layers and any number of rows."""

from __future__ import annotations

import functools
from typing import Any

import torch

from miles.services.trainer.backends.fsdp.model.sharded_model import decoder_layers


def compile_layers(model: torch.nn.Module, backend: Any = "inductor") -> None:
    """Have the decoder layers compiled when one first runs: once for training, and once for passes without gradient.

    `backend` is torch.compile's. Raises ValueError for a model with experts, whose shapes depend on the routing.
    """
    if any(hasattr(module, "experts") for module in model.modules()):
        raise ValueError(f"torch_compile is for dense models, and {type(model).__name__} has experts; leave it out")
    model.register_forward_pre_hook(_complete_plan, with_kwargs=True)
    for layer in decoder_layers(model):
        layer.compile(dynamic=True, backend=backend)


def _complete_plan(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Have the attention plan compute now what it computes when first asked: the compiler cannot trace that."""
    plan = kwargs["attention_plan"]
    for name, member in vars(type(plan)).items():
        if isinstance(member, functools.cached_property):
            getattr(plan, name)
