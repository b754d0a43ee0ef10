"""Experts chosen elsewhere, replayed in Megatron-Core's routers, for each micro-batch in flight.

Megatron-Core asks a router's `RouterReplay` for its choice. Ours gets the rows' experts before a chunk's forward pass
and keeps them for the backward pass, in which recomputed layers ask again: chunks run backward in the order in
which they ran forward. Weights of the chosen experts come from the router's own logits, so it is trained.
Dims: L local rows (this tensor-parallel rank's, with sequence parallelism), K experts per token.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.transformer.moe.router_replay import RouterReplay

from miles.services.trainer.backends.replayed_types import narrow

Chosen = tuple[torch.Tensor, torch.Tensor]
"""Scores and experts, [L, K]."""


class LayerReplay(RouterReplay):  # type: ignore[misc]
    """The choices of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.prescribed: torch.Tensor | None = None
        """[L, K] of any integer type for the current forward pass; None to choose freely."""
        self.kept: deque[torch.Tensor | None] = deque()
        """What was prescribed in forward passes whose backward pass is still to run."""
        self.in_backward = False
        self.recording = False
        self.recorded: torch.Tensor | None = None
        self.counted_L: torch.Tensor | None = None
        """bool [L]; rows that count as tokens."""
        self.different: list[torch.Tensor] = []
        """For each forward pass, how many counted rows the router would have sent elsewhere; 0-d."""

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., Chosen] | None = None,
    ) -> Chosen:
        """Called by the router to choose; scores are [L, experts]."""
        assert default_compute_topk is not None
        given_LK = self.kept.popleft() if self.in_backward else self.prescribed
        experts_LK = None if given_LK is None else given_LK.long()
        if experts_LK is not None and self.in_backward:
            return scores.gather(1, experts_LK), experts_LK
        if experts_LK is not None:
            self._compare(default_compute_topk(scores.detach(), topk, num_groups, group_topk)[1], experts_LK)
            return scores.gather(1, experts_LK), experts_LK
        chosen = default_compute_topk(scores, topk, num_groups, group_topk)
        if self.recording and not self.in_backward:
            self.recorded = narrow(chosen[1].detach(), scores.shape[1])
        return chosen

    def _compare(self, free_LK: torch.Tensor, experts_LK: torch.Tensor) -> None:
        differs_L = (free_LK.sort(dim=1).values != experts_LK.sort(dim=1).values).any(dim=1)
        if self.counted_L is not None:
            differs_L = differs_L & self.counted_L
        self.different.append(differs_L.sum())


@dataclasses.dataclass(frozen=True, slots=True)
class _Layer:
    index: int
    """Index among the model's mixture-of-experts layers; dense layers do not count."""
    replay: LayerReplay


class ModelReplay:
    """Record and replay of the routing of this rank's chunks of one model."""

    def __init__(self, chunks: Sequence[Any], moe_layers: Sequence[int]) -> None:
        """`chunks` are bare; `moe_layers` the numbers (from 1) of the model's mixture-of-experts layers.

        Raises ValueError when there are none.
        """
        self._chunks: list[list[_Layer]] = []
        for routers in chunk_routers(chunks, moe_layers):
            layers = []
            for index, router in routers:
                router.router_replay = LayerReplay()
                layers.append(_Layer(index, router.router_replay))
            self._chunks.append(layers)
        # The library keeps every instance it ever made; ours are set layer by layer.
        RouterReplay.clear_global_router_replay_instances()
        self.num_layers = len(moe_layers)

    def prescribe(self, chunk: int, experts_LNK: torch.Tensor | None, counted_L: torch.Tensor | None = None) -> None:
        """Before a chunk's forward pass: its rows' experts, [L, all moe layers, K], or None to choose freely."""
        for layer in self._chunks[chunk]:
            layer.replay.in_backward = False
            layer.replay.counted_L = counted_L
            layer.replay.prescribed = None if experts_LNK is None else experts_LNK[:, layer.index]

    def record(self, chunk: int) -> None:
        """Before a chunk's forward pass: let its layers choose, and keep their choice."""
        self.prescribe(chunk, None)
        for layer in self._chunks[chunk]:
            layer.replay.recording = True

    def recorded(self, chunk: int) -> dict[int, torch.Tensor]:
        """After the forward pass: the choice, [L, K] by mixture-of-experts layer, as `narrow` keeps it."""
        found = {}
        for layer in self._chunks[chunk]:
            assert layer.replay.recorded is not None, "record() was not called before the forward pass"
            found[layer.index] = layer.replay.recorded
            layer.replay.recording, layer.replay.recorded = False, None
        return found

    def prescribe_layers(self, chunk: int, experts: dict[int, torch.Tensor]) -> None:
        """As `prescribe`, with the choice that `recorded` returned."""
        self.prescribe(chunk, None)
        for layer in self._chunks[chunk]:
            layer.replay.prescribed = experts[layer.index]

    def forward_done(self, chunk: int, *, backward_follows: bool) -> None:
        """After a chunk's forward pass: from now on, until the next one, routers run in backward passes."""
        for layer in self._chunks[chunk]:
            if backward_follows:
                layer.replay.kept.append(layer.replay.prescribed)
        for layers in self._chunks:
            for layer in layers:
                layer.replay.in_backward = bool(layer.replay.kept)

    def finish(self) -> None:
        """Clear every choice after a pass over micro-batches."""
        for layers in self._chunks:
            for layer in layers:
                layer.replay.prescribed = None
                layer.replay.kept.clear()
                layer.replay.in_backward = False

    def take_different(self) -> torch.Tensor | None:
        """Rows × local layers that routers would have sent elsewhere since the last call; 0-d, None without layers."""
        counts = [count for layers in self._chunks for layer in layers for count in layer.replay.different]
        for layers in self._chunks:
            for layer in layers:
                layer.replay.different.clear()
        return torch.stack(counts).sum() if counts else None

    def layers_of(self, chunk: int) -> int:
        """Mixture-of-experts layers of a chunk."""
        return len(self._chunks[chunk])


def chunk_routers(chunks: Sequence[Any], moe_layers: Sequence[int]) -> list[list[tuple[int, Any]]]:
    """For each bare chunk its routers, with their indices among the model's mixture-of-experts layers.

    `moe_layers` are the numbers (from 1) of all of them. Raises ValueError when there are none.
    """
    if not moe_layers:
        raise ValueError(
            "the model has no mixture-of-experts layers, so there is no routing to replay or observe; "
            "turn off use_routing_replay, use_rollout_routing_replay and observe_rollout_routing"
        )
    order = {number: index for index, number in enumerate(moe_layers)}
    found = []
    for chunk in chunks:
        routers = [
            (layer.layer_number, getattr(getattr(layer, "mlp", None), "router", None)) for layer in chunk.decoder.layers
        ]
        found.append([(order[number], router) for number, router in routers if router is not None])
    return found


def moe_layer_numbers(config: Any) -> list[int]:
    """Numbers (from 1) of the mixture-of-experts layers of a TransformerConfig."""
    if config.num_moe_experts is None:
        return []
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return [i + 1 for i in range(config.num_layers) if i % frequency == 0]
    return [i + 1 for i, is_moe in enumerate(frequency) if is_moe]
