"""One rollout's training with Megatron-Core."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from miles.algorithms.metrics import MetricSum, reduce_metrics
from miles.services.trainer.backends.megatron.model.build_roles import MegatronRoles
from miles.services.trainer.backends.megatron.parallel.groups import ParallelRank, from_last_stage
from miles.services.trainer.backends.megatron.replay.step_routing import Routing
from miles.services.trainer.batch.rollout_batch import RolloutBatch
from miles.services.trainer.step.training_step import RolloutTrainer

if TYPE_CHECKING:
    from miles.config import JobConfig


class MegatronTrainer(RolloutTrainer):
    """Replicas are spread over ranks; the last pipeline stage has the metrics."""

    def __init__(
        self,
        config: JobConfig,
        roles: MegatronRoles,
        parallel: ParallelRank,
        routing: Routing | None,
        device: torch.device,
    ) -> None:
        super().__init__(config, roles, parallel.data, device)
        self._parallel = parallel
        self._policy = roles.policy
        self._routing = routing

    def begin(self, batch: RolloutBatch) -> None:
        """See `RolloutTrainer.begin`."""
        if self._routing is not None:
            self._routing.begin(batch)

    def reduce(self, parts: Sequence[dict[str, MetricSum]]) -> dict[str, float]:
        """See `RolloutTrainer.reduce`."""
        means = reduce_metrics(parts, self._data_ranks.group) if self._parallel.is_last_stage else {}
        metrics = _share(means | self._policy.take_mtp_metrics(), self._parallel)
        return metrics if self._routing is None else metrics | self._routing.metrics()


def _share(metrics: dict[str, float], parallel: ParallelRank) -> dict[str, float]:
    """The last stage's metrics on every stage."""
    if parallel.pipeline_size == 1:
        return metrics
    device = "cuda" if dist.get_backend(parallel.pipeline_group) == "nccl" else "cpu"
    text = torch.frombuffer(bytearray(json.dumps(metrics).encode()), dtype=torch.uint8).to(device)
    size = from_last_stage(torch.tensor([len(text)], device=device), parallel)
    buffer = text if parallel.is_last_stage else torch.empty(int(size), dtype=torch.uint8, device=device)
    shared: dict[str, float] = json.loads(from_last_stage(buffer, parallel).cpu().numpy().tobytes())
    return shared
