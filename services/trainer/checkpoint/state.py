"""How far a job's training has got: the steps taken, the groups consumed, the last metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

METRICS_KEPT = 64
"""How many steps' metrics a trainer keeps to answer repeated requests."""


@dataclasses.dataclass(slots=True)
class TrainerState:
    """How far training has got; part of every checkpoint's record."""

    step: int = 0
    """Training steps taken: rollouts consumed, which is also the policy version."""
    consumed_below: int = 0
    """Every group with a smaller id was trained on or dropped."""
    consumed_group_ids: set[int] = dataclasses.field(default_factory=set)
    """Groups at or above `consumed_below` that were trained on or dropped too."""
    metrics: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)
    """Metrics of the last `METRICS_KEPT` steps, by step."""

    def is_consumed(self, group_id: int) -> bool:
        """Whether the group was trained on or dropped."""
        return group_id < self.consumed_below or group_id in self.consumed_group_ids

    def consume(self, group_ids: Iterable[int]) -> None:
        """Mark groups as trained on or dropped."""
        self.consumed_group_ids.update(i for i in group_ids if i >= self.consumed_below)
        while self.consumed_below in self.consumed_group_ids:
            self.consumed_group_ids.remove(self.consumed_below)
            self.consumed_below += 1

    def finish_step(self, metrics: Mapping[str, float]) -> None:
        """Count a step and keep its metrics."""
        self.metrics[self.step] = dict(metrics)
        self.step += 1
        for step in sorted(self.metrics)[:-METRICS_KEPT]:
            del self.metrics[step]

    def to_json(self) -> dict[str, Any]:
        """The state as a JSON object."""
        return {
            "step": self.step,
            "consumed_below": self.consumed_below,
            "consumed_group_ids": sorted(self.consumed_group_ids),
            "metrics": {str(step): metrics for step, metrics in self.metrics.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainerState:
        """Inverse of `to_json`; raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            step=int(data["step"]),
            consumed_below=int(data["consumed_below"]),
            consumed_group_ids=set(data["consumed_group_ids"]),
            metrics={int(step): dict(metrics) for step, metrics in data["metrics"].items()},
        )
