"""A Hugging Face causal language model that has no weights yet."""

from __future__ import annotations

import threading
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from miles.precision.emulation.experts import PADDED
from miles.precision.emulation.model import emulate
from miles.precision.recipe import Recipe
from miles.services.rollout.engines.torch.model.attention import ATTENTION_NAME


def build_empty_model(
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    experts_implementation: str = PADDED,
    recipe: Recipe | None = None,
) -> torch.nn.Module:
    """Build the model in eval mode, with parameters on the meta device and buffers (rotary tables) on `device`.

    By a recipe it computes with weights that are rounded before they come. Raises NotEmulated.
    """
    builder = threading.get_ident()

    def to_meta(_module: torch.nn.Module, _name: str, parameter: torch.nn.Parameter) -> torch.nn.Parameter | None:
        if threading.get_ident() != builder or parameter is None or parameter.is_meta:
            return None
        return torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    register: Any = torch.nn.modules.module.register_module_parameter_registration_hook
    build: Any = AutoModelForCausalLM.from_config
    with register(to_meta):  # removes the hook at the end
        model: torch.nn.Module = build(
            config, dtype=dtype, attn_implementation=ATTENTION_NAME, experts_implementation=experts_implementation
        )
    if recipe is not None:
        emulate(model, recipe, weights=False, trained=False)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.requires_grad_(False).eval()
