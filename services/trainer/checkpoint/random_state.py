"""The states of PyTorch's random generators on this rank."""

from __future__ import annotations

import torch


def random_state() -> dict[str, torch.Tensor]:
    """The current state, by device type; uint8."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Restore a state; that of a device that this machine lacks is ignored."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
