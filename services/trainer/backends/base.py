"""What the trainer service asks of a training backend, and nothing else."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from miles.types import SampleGroup

if TYPE_CHECKING:
    import torch

    from miles.rpc.gen import policy_pb2
    from miles.services.trainer.checkpoint.background_save import Saving
    from miles.services.trainer.ranks.abandoning import Abandonment


METRICS_KEPT = 64
"""Steps whose metrics a trainer can still answer with."""


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """How far a training step has got; `phase` is a name of `TrainPhase` in trainer.proto, lower-case, no prefix."""

    phase: str
    micro_batches_done: int
    micro_batches: int


@dataclasses.dataclass(slots=True)
class TrainerState:
    """The part of a checkpoint that is not tensors."""

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
        """Note groups that were trained on or dropped."""
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


class TrainerBackend(Protocol):
    """Holds the parameters on this rank. Every rank makes the same calls in the same order."""

    loaded_from: pathlib.Path | None
    """Checkpoint that `load` read; None for the initial weights."""

    def load(self) -> TrainerState:
        """Build the model and optimizer; load the newest checkpoint, or the initial weights (an empty state)."""

    def train(
        self,
        step: int,
        groups: Sequence[SampleGroup],
        report: Callable[[Progress], None],
        abandonment: Abandonment | None = None,
    ) -> Mapping[str, float]:
        """Train on one rollout's groups and return metrics (`train/loss`, ...), the same on every rank.

        Raises StepAbandonedError, with everything as it was before, when `abandonment` asks for that in time.
        """

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The policy's parameters, or its adapter's, in a fixed order and the rollout's dtype; collective over ranks.

        Tensors are complete on every rank, on any device. Whoever reads them keeps none beyond the bucket that it is
        reading, so that a rank never holds more than two buckets of `update_weight_buffer_size` bytes.
        """

    @property
    def lora(self) -> policy_pb2.LoraAdapter | None:
        """Set when an export consists of an adapter, by PEFT's names: what it is to be merged with, and how.

        The base's checksum is known on every rank.
        """

    def export_layout(self) -> Sequence[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of what `export` will yield, in its order, without gathering anything."""

    def save(self, directory: pathlib.Path, state: TrainerState) -> None:
        """Write a checkpoint that `load` restores bit for bit: parameters, optimizer, scheduler, RNG, state."""

    def begin_save(self, directory: pathlib.Path, state: TrainerState) -> Saving:
        """As `save`, but return as soon as the contents are held; other calls may come before `Saving.finish`.

        Only for a job with `async_save`, and only when the one before has finished.
        """

    def save_hf(self, directory: pathlib.Path) -> None:
        """Write the policy as a HF checkpoint with tokenizer and config."""

    def close(self) -> None:
        """Free the model."""
