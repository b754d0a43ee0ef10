"""Which routing each micro-batch of a rollout replays, and how many tokens go elsewhere than in the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from miles.algorithms.metrics import MetricSum
from miles.services.trainer.backends.fsdp.replay.observer import RoutingObserver
from miles.services.trainer.backends.fsdp.replay.router import RoutingReplay
from miles.services.trainer.batch.packing import MicroBatch
from miles.services.trainer.batch.replayed_experts import rollout_routing
from miles.services.trainer.batch.rollout_batch import RolloutBatch

if TYPE_CHECKING:
    from miles.config import JobConfig


class Routing:
    """Sets and observes the policy's routing in each forward pass."""

    def __init__(self, config: JobConfig, model: torch.nn.Module, device: torch.device) -> None:
        """Raises ValueError for a model without routers that can be replayed."""
        self._from_rollout = config.rollout.use_rollout_routing_replay
        self.keeps = config.algorithm.use_routing_replay
        """Whether the choice of one pass over a micro-batch is replayed in the next, which must have the same ones."""
        self._replay = RoutingReplay(model) if self._from_rollout or self.keeps else None
        self._observer = RoutingObserver(model) if config.rollout.records_routing else None
        self._device = device
        self._recorded: dict[int, torch.Tensor] = {}
        """Routing by identity of the micro-batch, within one rollout."""
        self._trained = False
        """Whether the policy was trained on this rollout."""

    def begin(self) -> None:
        """Start a new rollout."""
        self._recorded.clear()
        self._trained = False
        if self._replay is not None:
            self._replay.take_difference()
        if self._observer is not None:
            self._observer.take()

    def before(self, batch: RolloutBatch, micro_batch: MicroBatch, *, training: bool) -> None:
        """Set the routing of the next forward: the engine's, what was recorded, or the model's own.

        With `training` its tokens are compared with the engine's routing: in a rollout each is trained on once.
        """
        self._trained |= training
        observer = self._observer if training else None
        if micro_batch.is_empty:
            self.choose_freely()
            return
        engine_TLK = None
        if self._from_rollout or observer is not None:
            engine_TLK = rollout_routing(batch.samples, micro_batch).to(self._device)
        if self._replay is not None:
            self._set_replay(self._replay, engine_TLK, micro_batch)
        if observer is not None and engine_TLK is not None:
            observer.expect(engine_TLK)

    def _set_replay(self, replay: RoutingReplay, engine_TLK: torch.Tensor | None, micro_batch: MicroBatch) -> None:
        if self._from_rollout and engine_TLK is not None:
            replay.replay(engine_TLK)
        elif id(micro_batch) in self._recorded:
            replay.replay(self._recorded[id(micro_batch)])
        else:
            replay.record()

    def choose_freely(self) -> None:
        """Let the model route the forward passes until the next `before` itself."""
        if self._replay is not None:
            self._replay.choose_freely()

    def after(self, micro_batch: MicroBatch) -> None:
        """End a forward pass; remember the routing that it has just recorded, for the training pass."""
        if self._observer is not None:
            self._observer.stop()
        if (
            self.keeps
            and self._replay is not None
            and not micro_batch.is_empty
            and id(micro_batch) not in self._recorded
        ):
            self._recorded[id(micro_batch)] = self._replay.recorded()

    def metrics(self) -> dict[str, MetricSum]:
        """This rank's part of the shares of rows × layers and of tokens that went elsewhere."""
        metrics = {}
        if self._from_rollout and self._replay is not None:
            different, counted = self._replay.take_difference()
            total = torch.tensor(different, dtype=torch.float64, device=self._device)
            metrics["train/routing_difference"] = MetricSum(total, counted)
        if self._observer is not None and self._trained:
            tokens, counted = self._observer.take()
            total = torch.zeros((), device=self._device) if tokens is None else tokens
            metrics["train/tokens_routed_differently"] = MetricSum(total, counted)
        return metrics
