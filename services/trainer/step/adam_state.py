"""Adam's state, of whichever implementation."""

from __future__ import annotations

import torch


def reset(optimizer: torch.optim.Optimizer) -> None:
    """Set moments and the count of steps to 0, in place; float32 masters, where it holds them, stay."""
    for state in optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq", "step"):
            if isinstance(state.get(name), torch.Tensor):
                state[name].zero_()
    for group in optimizer.param_groups:
        if "step" in group:  # fused ones count by group
            group["step"] = 0
