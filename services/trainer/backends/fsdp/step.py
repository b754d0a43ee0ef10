"""One rollout's training with Hugging Face models under FSDP2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from miles.algorithms.metrics import MetricSum, reduce_metrics
from miles.services.trainer.backends.fsdp.learner import FsdpLearner
from miles.services.trainer.backends.fsdp.replay.step_routing import Routing
from miles.services.trainer.batch.rollout_batch import RolloutBatch
from miles.services.trainer.step.data_ranks import DataRanks
from miles.services.trainer.step.roles import Roles
from miles.services.trainer.step.training_step import RolloutTrainer

if TYPE_CHECKING:
    from miles.config import JobConfig


JOINED_WORK = 2 * 10**12
"""Tokens × parameters of the policy. With gradient they take about 20 ms more than without on an H100, which is less
than the CPU takes to start the kernels of one more forward pass of a model of thirty layers."""


class FsdpTrainer(RolloutTrainer):
    """Every rank is a replica."""

    reports_together = True

    def __init__(self, config: JobConfig, roles: Roles, routing: Routing | None, device: torch.device) -> None:
        group = dist.group.WORLD if dist.get_world_size() > 1 else None
        super().__init__(config, roles, DataRanks(dist.get_rank(), dist.get_world_size(), group), device)
        self._routing = routing
        self.joined_tokens = joinable_tokens(
            device.type,
            dist.get_world_size(),
            config.train.train_dtype,
            keeps_routing=routing is not None,
            parameters=_parameters(roles),
        )

    def begin(self, batch: RolloutBatch) -> None:
        """See `RolloutTrainer.begin`."""
        if self._routing is not None:
            self._routing.begin()

    def reduce(self, parts: Sequence[dict[str, MetricSum]]) -> dict[str, float]:
        """See `RolloutTrainer.reduce`."""
        if self._routing is not None:
            parts = [*parts, self._routing.metrics()]
        return reduce_metrics(parts, self._data_ranks.group)


def joinable_tokens(device_type: str, ranks: int, train_dtype: str, *, keeps_routing: bool, parameters: int) -> int:
    """Tokens without gradient that an optimizer step may run with those that have one; 0 where they are run apart.

    Only on one GPU: elsewhere arithmetic takes the time, not the start of kernels. With several ranks, or routing that
    is kept by micro-batch, samples cannot be taken apart again (see `FsdpLearner`); float16 is where that would be
    needed. `parameters` is the policy's number of them.
    """
    if device_type != "cuda" or ranks > 1 or keeps_routing or train_dtype == "float16":
        return 0
    return JOINED_WORK // max(1, parameters)


def _parameters(roles: Roles) -> int:
    policy = roles.policy
    assert isinstance(policy, FsdpLearner)
    return sum(parameter.numel() for parameter in policy.model.parameters())
