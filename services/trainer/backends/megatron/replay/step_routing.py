"""Which routing each micro-batch of a rollout replays, and the share of tokens that would have gone elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
import torch.distributed as dist

from miles.services.trainer.backends.megatron.parallel.groups import ParallelRank
from miles.services.trainer.backends.megatron.parallel.rows import PADDING, LocalRows
from miles.services.trainer.backends.megatron.replay.router import ModelReplay
from miles.services.trainer.batch.packing import MicroBatch
from miles.services.trainer.batch.replayed_experts import rollout_routing
from miles.services.trainer.batch.rollout_batch import RolloutBatch

if TYPE_CHECKING:
    from miles.config import JobConfig


class Hooks(TypedDict, total=False):
    """Keyword arguments of `Pipeline.run`."""

    before: Callable[[int, int, LocalRows], None]
    after: Callable[[int, int], None]


class Routing:
    """Replays the engine's choices (use_rollout_routing_replay), or those of the log-probability pass."""

    def __init__(
        self,
        config: JobConfig,
        replay: ModelReplay,
        parallel: ParallelRank,
        device: torch.device,
        *,
        sequence_parallel: bool,
    ) -> None:
        self._from_rollout = config.rollout.use_rollout_routing_replay
        self.keeps = config.algorithm.use_routing_replay
        """Whether the choice of one pass over a micro-batch is replayed in the next, which must have the same ones."""
        self._replay = replay
        self._parallel = parallel
        self._device = device
        self._parts = parallel.tensor_size if sequence_parallel else 1
        self._batch: RolloutBatch | None = None
        self._recorded: dict[tuple[int, int], dict[int, torch.Tensor]] = {}
        """Choices by chunk and identity of the micro-batch, within one rollout."""
        self._different = 0.0
        self._counted = 0

    def begin(self, batch: RolloutBatch) -> None:
        """Start a new rollout."""
        self._batch = batch
        self._recorded.clear()
        self._different, self._counted = 0.0, 0
        self._replay.take_different()

    def hooks(self, micro_batches: Sequence[MicroBatch], *, with_gradient: bool) -> Hooks:
        """Hooks around the forward passes of these micro-batches."""

        def before(chunk: int, number: int, rows: LocalRows) -> None:
            micro_batch = micro_batches[number] if number < len(micro_batches) else None
            if micro_batch is None or micro_batch.is_empty:
                self._replay.prescribe(chunk, None)
            elif self._from_rollout:
                self._prescribe(chunk, micro_batch, rows)
            elif (chunk, id(micro_batch)) in self._recorded:
                self._replay.prescribe_layers(chunk, self._recorded[chunk, id(micro_batch)])
            else:
                self._replay.record(chunk)

        def after(chunk: int, number: int) -> None:
            micro_batch = micro_batches[number] if number < len(micro_batches) else None
            records = micro_batch is not None and not micro_batch.is_empty and not self._from_rollout
            if records and (chunk, id(micro_batch)) not in self._recorded:
                recorded = self._replay.recorded(chunk)
                self._recorded[chunk, id(micro_batch)] = recorded
                self._replay.prescribe_layers(chunk, recorded)  # a recomputation must choose the same
            self._replay.forward_done(chunk, backward_follows=with_gradient)

        return Hooks(before=before, after=after)

    def finish(self) -> None:
        """Finish a pass over micro-batches."""
        different = self._replay.take_different()
        if different is not None:
            self._different += float(different)
        self._replay.finish()

    def metrics(self) -> dict[str, float]:
        """train/routing_difference: share of rows × layers that replay sent elsewhere than the router would have.

        Collective; the same on every rank.
        """
        if not self._from_rollout:
            return {}
        sums = torch.tensor([self._different, float(self._counted)], dtype=torch.float64, device=self._device)
        dist.all_reduce(sums)  # each rank counts its own rows and layers; tensor-parallel copies cancel out
        return {"train/routing_difference": float(sums[0] / sums[1].clamp_min(1))}

    def _prescribe(self, chunk: int, micro_batch: MicroBatch, rows: LocalRows) -> None:
        assert self._batch is not None, "begin() was not called"
        routed_TNK = rollout_routing(self._batch.samples, micro_batch)
        if routed_TNK.shape[1] != self._replay.num_layers:
            raise ValueError(
                f"the rollout's routing has {routed_TNK.shape[1]} layers, but the model {self._replay.num_layers} "
                "mixture-of-experts layers; the engine must serve the model that is trained"
            )
        sources = torch.from_numpy(rows.sources_L)
        present_L = sources != PADDING
        experts_LNK = routed_TNK[sources]
        experts_LNK[~present_L] = torch.from_numpy(np.arange(routed_TNK.shape[2]))
        part = len(sources) // self._parts
        mine = (
            slice(self._parallel.tensor_rank * part, (self._parallel.tensor_rank + 1) * part)
            if self._parts > 1
            else slice(None)
        )
        counted_L = present_L[mine].to(self._device)
        self._replay.prescribe(chunk, experts_LNK[mine].to(self._device), counted_L)
        self._counted += int(present_L[mine].sum()) * self._replay.layers_of(chunk)
