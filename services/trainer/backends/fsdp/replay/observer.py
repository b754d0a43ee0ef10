"""Which tokens the trainer's routers send elsewhere than the engine did.

Hooks read what the experts of each layer are given, so replayed and free routing are measured alike, and
nothing is changed. Counts stay on the device until they are asked for.

Dims: T rows of the micro-batch, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch

from miles.services.trainer.backends.fsdp.replay.moe_layers import check_experts, find_moe_layers


class RoutingObserver:
    """Compares the experts that one model's tokens go to with expected ones, in chosen forward passes."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Hooks see what earlier hooks gave, so a model's `RoutingReplay` must be made first."""
        self._layers = find_moe_layers(model)
        self._expected: torch.Tensor | None = None
        self._different_T = torch.zeros(0, dtype=torch.bool)
        self._counts: list[torch.Tensor] = []
        self._rows = 0
        for number, layer in enumerate(self._layers):
            layer.experts.register_forward_pre_hook(self._hook(number))

    def expect(self, experts_TLK: torch.Tensor) -> None:
        """Compare the next forward pass with these experts, until `stop`; [T, layers, K] on the device."""
        check_experts(experts_TLK, self._layers)
        self._expected = experts_TLK
        self._different_T = torch.zeros(len(experts_TLK), dtype=torch.bool, device=experts_TLK.device)

    def stop(self) -> None:
        """End a forward pass that began with `expect`, so that recomputation in a backward pass is not compared."""
        if self._expected is not None:
            self._counts.append(self._different_T.sum())
            self._rows += len(self._different_T)
            self._expected = None

    def take(self) -> tuple[torch.Tensor | None, int]:
        """Tokens with other experts in any layer, 0-d or None without any pass, and all tokens, since last asked."""
        different = torch.stack(self._counts).sum() if self._counts else None
        rows = self._rows
        self._counts, self._rows = [], 0
        return different, rows

    def _hook(self, number: int) -> Any:
        def compare(module: torch.nn.Module, args: Any) -> None:
            if self._expected is not None:
                self._different_T |= differs(args[1], self._expected[:, number].long())

        return compare


def differs(experts_TK: torch.Tensor, others_TK: torch.Tensor) -> torch.Tensor:
    """Rows whose experts differ as a set; bool [T]."""
    return (experts_TK.sort(dim=1).values != others_TK.sort(dim=1).values).any(dim=1)
