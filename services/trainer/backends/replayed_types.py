"""The type in which experts are kept between forward and backward passes, which take int64."""

from __future__ import annotations

import torch


def narrow(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Experts of a layer, numbers below `num_experts`, in the narrowest type that all operations know."""
    return experts.to(torch.uint8 if num_experts <= 256 else torch.int16 if num_experts <= 32768 else torch.int32)
