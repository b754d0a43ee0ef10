"""Experts chosen elsewhere, replayed in the trainer's router.

A forward hook on each router of a mixture-of-experts layer replaces which experts a row goes to; their weights are
still computed from this router's logits, so gradients flow into it. Because the hook runs in every forward of the
router, replay also holds when gradient checkpointing recomputes a layer in the backward pass.

Dims: T rows of the micro-batch, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch


class _Router(Protocol):
    """What a supported router has beside its weights: it returns (logits [T, E], weights [T, K], experts [T, K])."""

    top_k: int
    num_experts: int
    norm_topk_prob: bool


@dataclasses.dataclass(slots=True)
class _State:
    replayed: torch.Tensor | None = None
    """int64 [T, layers, K]; None to let the routers choose."""
    recorded: dict[int, torch.Tensor] | None = None
    """int64 [T, K] by layer: the first choice, which later forwards of the same micro-batch replay."""


class RoutingReplay:
    """Record and replay of the routing of one model. Hooks are per instance, so a reference model is not touched."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._routers = find_routers(model)
        self._state = _State()
        self._different: list[torch.Tensor] = []
        self._counted = 0
        for layer, (_, module) in enumerate(self._routers):
            module.register_forward_hook(self._hook(layer))

    @property
    def num_layers(self) -> int:
        """Mixture-of-experts layers of the model."""
        return len(self._routers)

    def choose_freely(self) -> None:
        """Let the routers choose, in every forward anew."""
        self._state = _State()

    def record(self) -> None:
        """Keep the next forward's choice per layer, and replay it in further forwards until the next call."""
        self._state = _State(recorded={})

    def recorded(self) -> torch.Tensor:
        """What was recorded; int64 [T, layers, K]."""
        assert self._state.recorded is not None, "record() was not called before the forward"
        return torch.stack([self._state.recorded[layer] for layer in range(self.num_layers)], dim=1)

    def replay(self, experts_TLK: torch.Tensor) -> None:
        """Send rows to these experts until the next call; int64 [T, layers, K]."""
        check_experts(experts_TLK, self._routers)
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

    def _hook(self, layer: int) -> Any:
        def replace(
            module: torch.nn.Module, args: Any, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
            state = self._state
            if state.replayed is not None:
                experts_TK = state.replayed[:, layer]
                self._compare(output[2], experts_TK)
            elif state.recorded is not None:
                experts_TK = state.recorded.setdefault(layer, output[2].detach())
            else:
                return None
            return _weigh(cast(_Router, module), output, experts_TK)

        return replace


def _weigh(
    router: _Router, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor], experts_TK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The router's output as if it had chosen `experts_TK`."""
    logits_TE, weights_TK, _ = output
    chosen_TK = torch.softmax(logits_TE, dim=-1, dtype=torch.float32).gather(1, experts_TK)
    if router.norm_topk_prob:
        chosen_TK = chosen_TK / chosen_TK.sum(dim=-1, keepdim=True)
    return logits_TE, chosen_TK.to(weights_TK.dtype), experts_TK


def find_routers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Name and module of every softmax top-k router, in layer order. Raises ValueError when there is none."""
    routers = [
        (name, module)
        for name, module in model.named_modules()
        if all(hasattr(module, attribute) for attribute in ("top_k", "num_experts", "norm_topk_prob", "weight"))
    ]
    if not routers:
        raise ValueError(
            f"{type(model).__name__} has no softmax top-k router, so there is no routing to replay or observe; "
            "turn off use_routing_replay, use_rollout_routing_replay and observe_rollout_routing"
        )
    return routers


def check_experts(experts_TLK: torch.Tensor, routers: Sequence[tuple[str, torch.nn.Module]]) -> None:
    """Raise ValueError unless experts [T, layers, K] are of a model with these routers."""
    layers, top_k = experts_TLK.shape[1:]
    expected = cast(_Router, routers[0][1]).top_k
    if (layers, top_k) != (len(routers), expected):
        raise ValueError(
            f"routing of {layers} layers and {top_k} experts per token does not fit a model with "
            f"{len(routers)} mixture-of-experts layers and {expected} experts per token"
        )
