"""Takes hidden states out of a forward pass, for drafts that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from miles.services.rollout.engines.torch.model.architecture import UnsupportedModel


class HiddenStates:
    """Keeps the output of some decoder layers of each forward pass, by hooks on them."""

    def __init__(self, model: torch.nn.Module, layers: Sequence[int], num_layers: int) -> None:
        """`layers`: numbers from 0; none costs nothing. Raises UnsupportedModel when the model has not that layer."""
        self._states_ND: dict[int, torch.Tensor] = {}
        if not layers:
            return
        blocks = decoder_layers(model, num_layers)
        for layer in layers:
            if not 0 <= layer < num_layers:
                raise UnsupportedModel(f"the draft reads layer {layer}; the policy has layers 0 to {num_layers - 1}")
            blocks[layer].register_forward_hook(self._hook(layer))

    def _hook(self, layer: int) -> Any:
        def keep(_module: torch.nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            self._states_ND[layer] = hidden[0]

        return keep

    def take(self) -> Mapping[int, torch.Tensor]:
        """The last forward pass's states by layer, [packed tokens and padding, D]."""
        states_ND, self._states_ND = self._states_ND, {}
        return states_ND


def decoder_layers(model: torch.nn.Module, num_layers: int) -> torch.nn.ModuleList:
    """The list of a causal language model's decoder layers. Raises UnsupportedModel when none is of its length."""
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers:
            return module
    raise UnsupportedModel(f"{type(model).__name__} has no list of {num_layers} decoder layers, which the draft reads")
