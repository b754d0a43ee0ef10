"""Records which experts each token was routed to."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch


class RoutingRecorder:
    """Records the expert choices of every mixture-of-experts layer during a forward pass, by hooks on the experts."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._experts: list[Any] = [
            module for module in model.modules() if hasattr(module, "num_experts") and hasattr(module, "gate_up_proj")
        ]
        self._chosen: dict[int, torch.Tensor] = {}
        self.enabled = False
        """Whether the next forward pass is recorded."""
        for layer, module in enumerate(self._experts):
            module.register_forward_pre_hook(self._hook(layer))

    @property
    def layers(self) -> int:
        """Mixture-of-experts layers in the model; 0 for a dense one."""
        return len(self._experts)

    @property
    def dtype(self) -> npt.DTypeLike:
        """uint8 when every expert number fits, else uint16."""
        return np.uint8 if all(module.num_experts <= 256 for module in self._experts) else np.uint16

    def _hook(self, layer: int) -> Any:
        def record(_module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            if self.enabled:
                self._chosen[layer] = args[1]

        return record

    def take(self, tokens: int) -> npt.NDArray[Any]:
        """Take the last forward pass's choices for its first `tokens` tokens: (tokens, layers, k), best first."""
        chosen_NLK = torch.stack([self._chosen[layer][:tokens] for layer in range(self.layers)], dim=1)
        self._chosen.clear()
        return chosen_NLK.cpu().numpy().astype(self.dtype)


class RoutingLog:
    """The recorded choices of one request, for positions 0, 1, 2, ... without gaps."""

    def __init__(self) -> None:
        self._parts: list[npt.NDArray[Any]] = []
        self.length = 0
        """Positions recorded so far."""

    def extend(self, start: int, choices_NLK: npt.NDArray[Any]) -> None:
        """Add the choices for positions from `start` on; those already recorded stay as they were."""
        known = self.length - start
        if known < 0:
            raise ValueError(f"routing of positions {self.length} to {start - 1} is missing")
        if known < len(choices_NLK):
            self._parts.append(choices_NLK[known:])
            self.length = start + len(choices_NLK)

    def prefix(self, length: int) -> npt.NDArray[Any]:
        """Choices of the first `length` positions: (length, layers, k)."""
        if len(self._parts) > 1:
            self._parts = [np.concatenate(self._parts)]
        return self._parts[0][:length]
