"""The parameters of a checkpoint's model, to refuse weights that do not fit before a server loads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from miles.weights.base import WeightsRefused

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, slots=True)
class ModelLayout:
    """Parameters and sizes of a checkpoint's model."""

    shapes: Shapes
    """Shape of every parameter, by its name in transformers, tied ones once."""
    vocabulary: int
    max_positions: int
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Further names of tied parameters, each with the one in `shapes`. SGLang ties them only for some model types, and
    otherwise needs the weights under every name."""


_EXPERTS_IN_EVERY_LAYER = ("qwen2_moe", "qwen3_moe")
"""Model types that SGLang builds with experts in every layer, whatever the configuration says."""


def read_layout(hf_checkpoint: str) -> ModelLayout:
    """Read the layout of a checkpoint's model, but no weights.

    Raises OSError or ValueError when transformers has no causal language model of the checkpoint's type.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(hf_checkpoint)
    dense = getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1
    if config.model_type in _EXPERTS_IN_EVERY_LAYER and dense:
        raise ValueError(
            f"{hf_checkpoint}: mlp_only_layers or decoder_sparse_step make some layers dense, but SGLang gives every "
            f"layer of a {config.model_type} experts; use rollout_backend = torch"
        )
    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model = build(config)
    model.tie_weights()
    text = config.get_text_config()
    first = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=True)}
    every = model.named_parameters(remove_duplicate=False)
    return ModelLayout(
        {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=True)},
        int(text.vocab_size),
        int(getattr(text, "max_position_embeddings", 0) or 0),
        {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name},
    )


def misfits(shapes: Shapes, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> list[str]:
    """List the faults of a full set of weights.

    SGLang ignores unknown names and keeps old weights where none are sent: both would go unnoticed.
    """
    faults = [f"{name} is missing" for name in shapes if name not in tensors]
    for name, tensor in tensors.items():
        if name not in shapes:
            faults.append(f"{name} is no parameter of the model")
        elif tuple(tensor.shape) != shapes[name]:
            faults.append(f"{name} has shape {tuple(tensor.shape)} instead of {shapes[name]}")
        elif tensor.dtype != dtype and tensor.is_floating_point() and tensor.dtype != torch.float32:
            faults.append(f"{name} is {tensor.dtype} instead of {dtype}")
    return faults


def refuse(faults: Sequence[str], model: str) -> None:
    """Raise WeightsRefused with the first faults of weights for that model, if there are any."""
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise WeightsRefused(f"the weights do not fit the {model}: {'; '.join(faults[:5])}{more}")
