"""Balance by routers' per-expert bias, without a loss (Wang et al. 2024, arXiv 2408.15664).

Megatron-Core would move it with the reduction of gradients, and again if the optimizer step is then abandoned and
taken later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class ExpertBias:
    """Counts the tokens of each expert in training passes, and moves the bias with the optimizer step."""

    def __init__(self, chunks: Sequence[Any], rate: float) -> None:
        """`chunks` are bare; a rate of 0 moves nothing."""
        found = [module for chunk in chunks for module in chunk.modules()] if rate else []
        self._routers = [module for module in found if getattr(module, "expert_bias", None) is not None]
        self._rate = rate
        self._counts = [torch.zeros_like(router.expert_bias, dtype=torch.float32) for router in self._routers]
        for router, count_E in zip(self._routers, self._counts, strict=True):
            router.register_forward_hook(_counting(count_E))

    def forget(self) -> None:
        """Discard what was counted."""
        for count_E in self._counts:
            count_E.zero_()

    def move(self) -> None:
        """bias += rate × sign(mean count − count), with counts of all rows of all ranks; collective.

        Padding that makes rows divide over tensor-parallel ranks counts as tokens do.
        """
        from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias

        for router, count_E in zip(self._routers, self._counts, strict=True):
            router.expert_bias.copy_(get_updated_expert_bias(count_E, router.expert_bias, self._rate))
        self.forget()


def _counting(count_E: torch.Tensor) -> Any:
    """A forward hook of a router that adds its choice to `count_E`, once where a layer is recomputed."""

    def count(module: torch.nn.Module, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        if torch.is_grad_enabled():
            count_E.add_(output[1].detach().sum(dim=0))

    return count
