"""Decoder layers compiled by torch.compile: one graph for all layers and any number of rows.

Nothing is compiled again once a training step has run: the graph holds for every micro-batch of two rows or more.
Without that, a step that happens to look different waits some seconds for the compiler.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx.experimental._config as shape_config

from miles.services.trainer.backends.fsdp.model.sharded_model import decoder_layers

OPTIONS: dict[str, Any] = {
    "triton.mix_order_reduction": False,  # is chosen above 4096 rows, and guards that the others are as many
    "shape_padding": False,  # pads products by the rows of the first micro-batch
}
"""Of the inductor backend: nothing that depends on the first micro-batch's size."""


def compile_layers(model: torch.nn.Module, backend: Any = "inductor") -> None:
    """Have the decoder layers compiled when one first runs: once for training, and once for passes without gradient.

    `backend` is torch.compile's. Raises ValueError for a model with experts, whose shapes depend on the routing.
    """
    if any(hasattr(module, "experts") for module in model.modules()):
        raise ValueError(f"torch_compile is for dense models, and {type(model).__name__} has experts; leave it out")
    prepare(model)
    for layer in decoder_layers(model):
        layer.compile(dynamic=True, backend=backend, options=OPTIONS if backend == "inductor" else None)


def prepare(model: torch.nn.Module) -> None:
    """Have what is compiled of a model hold for every micro-batch."""
    # Sizes that are equal in the first micro-batch (rows and slots, where it shares no prompt) may differ later.
    shape_config.use_duck_shape = False
    model.register_forward_pre_hook(_complete_plan, with_kwargs=True)


def _complete_plan(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    kwargs["attention_plan"].complete()
