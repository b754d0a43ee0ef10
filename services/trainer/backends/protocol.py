"""The interface of a training backend, as the trainer service uses it."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from miles.services.trainer.batch.rollout_schedule import RolloutSchedule
from miles.services.trainer.checkpoint.state import TrainerState
from miles.services.trainer.step.progress import Report
from miles.types import SampleGroup

if TYPE_CHECKING:
    import torch

    from miles.rpc.gen import policy_pb2
    from miles.services.trainer.backends.parking import Moved
    from miles.services.trainer.checkpoint.background_save import Saving
    from miles.services.trainer.ranks.abandoning import Abandonment


class TrainerBackend(Protocol):
    """Holds the parameters on this rank. Every rank makes the same calls in the same order."""

    loaded_from: pathlib.Path | None
    """Checkpoint that `load` read; None for the initial weights."""
    notes: list[str]
    """What a person should know of how `load` went."""
    warnings: Sequence[str]
    """What a person should know of how the last `train` went; the same on every rank."""

    def load(self) -> TrainerState:
        """Build the model and optimizer; load the newest checkpoint, or the initial weights (an empty state)."""

    def train(
        self,
        step: int,
        groups: Sequence[SampleGroup],
        report: Report,
        abandonment: Abandonment | None = None,
        schedule: RolloutSchedule | None = None,
    ) -> Mapping[str, float]:
        """Train on one rollout's groups and return metrics (`train/loss`, ...), the same on every rank.

        With rank 0's `schedule`, this rank needs the routed experts of its own replica's samples only. Raises
        StepAbandonedError, with everything as it was before, when `abandonment` is requested in time.
        """

    @property
    def replica(self) -> int:
        """The number of the replica whose samples this rank computes."""

    def schedule(self, groups: Sequence[SampleGroup]) -> RolloutSchedule:
        """Decide which replica trains on which samples of a rollout; not collective.

        Raises ValueError when they are not as many as the configuration says.
        """

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The policy's parameters, or its adapter's, in the order of `export_layout`; collective over ranks.

        Gathered ones have the layout's types. Others may have the type in which they are held, and are converted where
        they are copied.

        Tensors are complete on every rank, on any device. A reader must keep none beyond the bucket that it is
        reading, so that a rank never holds more than two buckets of `update_weight_buffer_size` bytes.
        """

    def export_to_first(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of `export` in the layout's types, on rank 0 alone; collective: the others yield nothing.

        Where it can, it gathers only what has changed since it was called last. The tensors are in host memory and are
        never written to, so a reader may keep them.
        """

    @property
    def lora(self) -> policy_pb2.LoraAdapter | None:
        """The adapter that an export consists of, by PEFT's names: its base and how to merge it. None for full weights.

        The base's checksum is known on every rank.
        """

    def export_layout(self) -> Sequence[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of what `export` will yield, in its order, without gathering anything."""

    def save(self, directory: pathlib.Path, state: TrainerState) -> None:
        """Write a checkpoint that `load` restores bit for bit: parameters, optimizer, scheduler, RNG, state."""

    def begin_save(self, directory: pathlib.Path, state: TrainerState) -> Saving:
        """As `save`, but return as soon as the contents are copied; other calls may come before `Saving.finish`.

        Only for a job with `async_save`, and only when the one before has finished.
        """

    def save_hf(self, directory: pathlib.Path) -> None:
        """Write the policy as a HF checkpoint with tokenizer and config."""

    def release_memory(self, *, state: bool = True) -> Moved:
        """Free what the device keeps for the next step.

        With `state` weights, gradients and optimizer go to host memory too; then no other call until `restore_memory`.
        """

    def restore_memory(self) -> Moved:
        """Move them back, bit for bit; does nothing when they are there."""

    def close(self) -> None:
        """Free the model."""
