"""Which routing each micro-batch of a rollout replays: the engine's, or what the log-probability pass chose."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from miles.algorithms.metrics import MetricSum
from miles.services.trainer.backends.fsdp.replay.router import RoutingReplay
from miles.services.trainer.batch.packing import MicroBatch
from miles.services.trainer.batch.replayed_experts import rollout_routing
from miles.services.trainer.batch.rollout_batch import RolloutBatch

if TYPE_CHECKING:
    from miles.config import JobConfig


class Routing:
    """Sets the policy's routing before each forward pass."""

    def __init__(self, config: JobConfig, replay: RoutingReplay, device: torch.device) -> None:
        self._from_rollout = config.rollout.use_rollout_routing_replay
        self.keeps = config.algorithm.use_routing_replay
        """Whether the choice of one pass over a micro-batch is replayed in the next, which must have the same ones."""
        self._replay = replay
        self._device = device
        self._recorded: dict[int, torch.Tensor] = {}
        """Routing by identity of the micro-batch, within one rollout."""

    def begin(self) -> None:
        """Start a new rollout."""
        self._recorded.clear()
        self._replay.take_difference()

    def before(self, batch: RolloutBatch, micro_batch: MicroBatch) -> None:
        """Set the routing of the next forward: the engine's, what was recorded, or the model's own."""
        if micro_batch.is_empty:
            self._replay.choose_freely()
        elif self._from_rollout:
            self._replay.replay(rollout_routing(batch.samples, micro_batch).to(self._device))
        elif id(micro_batch) in self._recorded:
            self._replay.replay(self._recorded[id(micro_batch)])
        else:
            self._replay.record()

    def choose_freely(self) -> None:
        """Let the model route the forward passes until the next `before` itself."""
        self._replay.choose_freely()

    def after(self, micro_batch: MicroBatch) -> None:
        """Remember the routing that a log-probability pass has just recorded, for the training pass."""
        if self.keeps and not micro_batch.is_empty and id(micro_batch) not in self._recorded:
            self._recorded[id(micro_batch)] = self._replay.recorded()

    def metrics(self) -> dict[str, MetricSum]:
        """This rank's part of train/routing_difference: the share of rows × layers that went elsewhere."""
        if not self._from_rollout:
            return {}
        different, counted = self._replay.take_difference()
        total = torch.tensor(different, dtype=torch.float64, device=self._device)
        return {"train/routing_difference": MetricSum(total, counted)}
