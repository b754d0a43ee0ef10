"""One rollout's training with Hugging Face models under FSDP2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from miles.algorithms.metrics import MetricSum, reduce_metrics
from miles.services.trainer.backends.fsdp.replay.step_routing import Routing
from miles.services.trainer.batch.rollout_batch import RolloutBatch
from miles.services.trainer.step.data_ranks import DataRanks
from miles.services.trainer.step.roles import Roles
from miles.services.trainer.step.training_step import RolloutTrainer

if TYPE_CHECKING:
    from miles.config import JobConfig


class FsdpTrainer(RolloutTrainer):
    """Every rank is a replica."""

    reports_together = True

    def __init__(self, config: JobConfig, roles: Roles, routing: Routing | None, device: torch.device) -> None:
        group = dist.group.WORLD if dist.get_world_size() > 1 else None
        super().__init__(config, roles, DataRanks(dist.get_rank(), dist.get_world_size(), group), device)
        self._routing = routing

    def begin(self, batch: RolloutBatch) -> None:
        """See `RolloutTrainer.begin`."""
        if self._routing is not None:
            self._routing.begin()

    def reduce(self, parts: Sequence[dict[str, MetricSum]]) -> dict[str, float]:
        """See `RolloutTrainer.reduce`."""
        if self._routing is not None:
            parts = [*parts, self._routing.metrics()]
        return reduce_metrics(parts, self._data_ranks.group)
