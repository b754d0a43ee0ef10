"""How far a job's training has got: the steps taken, the groups consumed, the data they came from, the last metrics."""

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
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Identity of the prompts and their order, as `PromptSource.identity` gives it; empty when it is not known."""
    data_begins_at: int = 0
    """The group that has the first prompt of that order."""

    def is_consumed(self, group_id: int) -> bool:
        """Whether the group was trained on or dropped."""
        return group_id < self.consumed_below or group_id in self.consumed_group_ids

    def consume(self, group_ids: Iterable[int]) -> None:
        """Mark groups as trained on or dropped."""
        self.consumed_group_ids.update(i for i in group_ids if i >= self.consumed_below)
        while self.consumed_below in self.consumed_group_ids:
            self.consumed_group_ids.remove(self.consumed_below)
            self.consumed_below += 1

    def take_data(self, identity: Mapping[str, Any], groups_begun: int) -> str | None:
        """Go on with these prompts; other ones, or another order, start at their beginning.

        `groups_begun` is an id above all groups that were begun on the former prompts: those that are not consumed
        count as such from now on. Returns what has changed, in words.
        """
        known, was = bool(self.data), dict(self.data)
        self.data = dict(identity)
        if not known or not identity:
            return None
        if differences := _order_differences(was, identity):
            self.consume(range(self.consumed_below, max([groups_begun, *(i + 1 for i in self.consumed_group_ids)])))
            self.data_begins_at = self.consumed_below
            return (
                f"the data set is another one than before ({'; '.join(differences)}): "
                f"{identity['source']} starts at its first row"
            )
        if was.get("answers") != identity.get("answers"):
            return (
                f"{identity['source']} has the same prompts in the same order as before, with other labels or "
                "metadata: it goes on at its position with the new ones"
            )
        return None

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
            "data": dict(self.data),
            "data_begins_at": self.data_begins_at,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainerState:
        """Inverse of `to_json`; raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            step=int(data["step"]),
            consumed_below=int(data["consumed_below"]),
            consumed_group_ids=set(data["consumed_group_ids"]),
            metrics={int(step): dict(metrics) for step, metrics in data["metrics"].items()},
            data=dict(data.get("data", {})),  # older checkpoints lack it
            data_begins_at=int(data.get("data_begins_at", 0)),
        )


def _order_differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How two identities differ in what the prompt of a group depends on."""
    found = []
    if (was.get("prompts"), was.get("digest")) != (now.get("prompts"), now.get("digest")):
        sets = [f"{each.get('source')} with {each.get('prompts')} prompts" for each in (was, now)]
        same_name = "; its contents have changed" if sets[0] == sets[1] else ""
        found.append(f"prompt_data was {sets[0]}, is {sets[1]}{same_name}")
    if was.get("rollout_shuffle") != now.get("rollout_shuffle"):
        found.append(f"rollout_shuffle was {was.get('rollout_shuffle')}, is {now.get('rollout_shuffle')}")
    elif now.get("rollout_shuffle") and was.get("rollout_seed") != now.get("rollout_seed"):
        found.append(f"rollout_seed was {was.get('rollout_seed')}, is {now.get('rollout_seed')}")
    return found
