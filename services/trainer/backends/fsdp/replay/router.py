"""Experts chosen elsewhere, replayed in the trainer's model.

Hooks in each mixture-of-experts layer replace which experts a row goes to; their weights are still computed from the
layer's own logits, so gradients flow into its router. Because hooks run in every forward pass of the layer, replay also
holds when gradient checkpointing recomputes it in the backward pass.

Dims: T rows of the micro-batch, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from miles.services.trainer.backends.fsdp.replay.moe_layers import check_experts, find_moe_layers
from miles.services.trainer.backends.replayed_types import narrow


@dataclasses.dataclass(slots=True)
class _State:
    replayed: torch.Tensor | None = None
    """[T, layers, K] of any integer type; None to let the routers choose."""
    recorded: dict[int, torch.Tensor] | None = None
    """[T, K] by layer, as `narrow` keeps it: the first choice, which later forwards of the same micro-batch replay."""


class RoutingReplay:
    """Record and replay of the routing of one model. Hooks are per instance, so a reference model is not touched."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._layers = find_moe_layers(model)
        self._logits: dict[int, torch.Tensor] = {}
        """[T, E] by layer, between a gate's forward pass and its experts'."""
        self._state = _State()
        self._different: list[torch.Tensor] = []
        self._counted = 0
        for number, layer in enumerate(self._layers):
            layer.gate.register_forward_hook(self._keep_logits(number))
            layer.experts.register_forward_pre_hook(self._replace(number))

    @property
    def num_layers(self) -> int:
        """Mixture-of-experts layers of the model."""
        return len(self._layers)

    def choose_freely(self) -> None:
        """Let the routers choose, in every forward anew."""
        self._state = _State()

    def record(self) -> None:
        """Keep the next forward's choice per layer, and replay it in further forwards until the next call."""
        self._state = _State(recorded={})

    def recorded(self) -> torch.Tensor:
        """What was recorded; [T, layers, K] as `narrow` keeps it."""
        assert self._state.recorded is not None, "record() was not called before the forward"
        return torch.stack([self._state.recorded[layer] for layer in range(self.num_layers)], dim=1)

    def replay(self, experts_TLK: torch.Tensor) -> None:
        """Send rows to these experts until the next call; [T, layers, K] of any integer type."""
        check_experts(experts_TLK, self._layers)
        self._state = _State(replayed=experts_TLK)

    def take_difference(self) -> tuple[float, int]:
        """Rows × layers that `replay` sent elsewhere than the routers would have, and all, since last asked."""
        different = float(torch.stack(self._different).sum()) if self._different else 0.0
        counted = self._counted
        self._different, self._counted = [], 0
        return different, counted

    def _compare(self, free_TK: torch.Tensor, experts_TK: torch.Tensor) -> None:
        differs_T = (free_TK.sort(dim=1).values != experts_TK.sort(dim=1).values).any(dim=1)
        self._different.append(differs_T.sum())
        self._counted += len(differs_T)

    def _keep_logits(self, number: int) -> Any:
        def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
            if self._state.replayed is not None or self._state.recorded is not None:
                self._logits[number] = output[0] if isinstance(output, tuple) else output

        return keep

    def _replace(self, number: int) -> Any:
        def replace(module: torch.nn.Module, args: Any) -> Any:
            hidden, free_TK, weights_TK = args
            state = self._state
            if state.replayed is not None:
                experts_TK = state.replayed[:, number].long()
                self._compare(free_TK, experts_TK)
            elif state.recorded is not None:
                if number not in state.recorded:
                    state.recorded[number] = narrow(free_TK.detach(), self._logits[number].shape[-1])
                experts_TK = state.recorded[number].long()
            else:
                return None
            chosen_TK = self._layers[number].weigh(self._logits.pop(number), experts_TK)
            return hidden, experts_TK, chosen_TK.to(weights_TK.dtype)

        return replace
