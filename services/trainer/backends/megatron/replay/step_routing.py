"""Which routing each micro-batch of a rollout replays, and how many tokens go elsewhere than in the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypedDict

import torch
import torch.distributed as dist

from miles.services.trainer.backends.megatron.parallel.rows import LocalRows
from miles.services.trainer.backends.megatron.replay.engine_rows import EngineRows, RowCutter
from miles.services.trainer.backends.megatron.replay.observer import RoutingObserver
from miles.services.trainer.backends.megatron.replay.router import ModelReplay
from miles.services.trainer.batch.packing import MicroBatch
from miles.services.trainer.batch.rollout_batch import RolloutBatch

if TYPE_CHECKING:
    from miles.config import JobConfig


class Hooks(TypedDict, total=False):
    """Keyword arguments of `Pipeline.run`."""

    before: Callable[[int, int, LocalRows], None]
    after: Callable[[int, int], None]


class Routing:
    """Replays the engine's choices (use_rollout_routing_replay) or those of the log-probability pass; observes them."""

    def __init__(
        self, config: JobConfig, replay: ModelReplay | None, observer: RoutingObserver | None, cutter: RowCutter
    ) -> None:
        """Without `replay` routers choose freely; without `observer` nothing is compared with the engine."""
        self._from_rollout = config.rollout.use_rollout_routing_replay
        self.keeps = config.algorithm.use_routing_replay
        """Whether the choice of one pass over a micro-batch is replayed in the next, which must have the same ones."""
        self._replay = replay
        self._observer = observer
        self._cutter = cutter
        self._batch: RolloutBatch | None = None
        self._recorded: dict[tuple[int, int], dict[int, torch.Tensor]] = {}
        """Choices by chunk and identity of the micro-batch, within one rollout."""
        self._different: list[torch.Tensor] = []
        self._counted = 0

    def begin(self, batch: RolloutBatch) -> None:
        """Start a new rollout."""
        self._batch = batch
        self._recorded.clear()
        self._different, self._counted = [], 0
        if self._replay is not None:
            self._replay.take_different()
        if self._observer is not None:
            self._observer.forget()

    def hooks(self, micro_batches: Sequence[MicroBatch], *, with_gradient: bool, training: bool) -> Hooks:
        """Hooks around the forward passes of these micro-batches.

        With `training` their tokens are compared with the engine's routing: in a rollout each is trained on once.
        """
        observer = self._observer if training else None
        if observer is not None:
            observer.begin_pass()

        def before(chunk: int, number: int, rows: LocalRows) -> None:
            micro_batch = micro_batches[number] if number < len(micro_batches) else None
            if micro_batch is None or micro_batch.is_empty:
                if self._replay is not None:
                    self._replay.prescribe(chunk, None)
                return
            engine = self._engine_rows(micro_batch, rows) if self._from_rollout or observer is not None else None
            if self._replay is not None:
                self._set_replay(self._replay, chunk, micro_batch, engine)
            if observer is not None and engine is not None:
                observer.expect(number, engine)

        def after(chunk: int, number: int) -> None:
            if observer is not None:
                observer.stop()
            if self._replay is None:
                return
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
        if self._replay is None:
            return
        different = self._replay.take_different()
        if different is not None:
            self._different.append(different)
        self._replay.finish()

    def metrics(self) -> dict[str, float]:
        """The shares of rows × layers that replay sent elsewhere, and of tokens that went elsewhere than in the engine.

        Collective; the same on every rank. Each rank counts its own rows; copies of them cancel out.
        """
        metrics = {}
        if self._from_rollout:
            different = torch.stack(self._different).sum() if self._different else None
            metrics["train/routing_difference"] = self._share(different, self._counted)
        if self._observer is not None:
            metrics["train/tokens_routed_differently"] = self._share(*self._observer.take(self._cutter.device))
        return {name: share for name, share in metrics.items() if share is not None}

    def _share(self, different: torch.Tensor | None, counted: int) -> float | None:
        """Share of all ranks' rows that differ; None when there are no rows."""
        sums = torch.tensor([0.0, float(counted)], dtype=torch.float64, device=self._cutter.device)
        if different is not None:
            sums[0] = different
        dist.all_reduce(sums)
        return float(sums[0] / sums[1]) if sums[1] else None

    def _set_replay(self, replay: ModelReplay, chunk: int, micro_batch: MicroBatch, engine: EngineRows | None) -> None:
        if self._from_rollout and engine is not None:
            replay.prescribe(chunk, engine.experts_LNK, engine.present_L)
            self._counted += engine.count * replay.layers_of(chunk)
        elif (chunk, id(micro_batch)) in self._recorded:
            replay.prescribe_layers(chunk, self._recorded[chunk, id(micro_batch)])
        else:
            replay.record(chunk)

    def _engine_rows(self, micro_batch: MicroBatch, rows: LocalRows) -> EngineRows:
        assert self._batch is not None, "begin() was not called"
        return self._cutter.cut(self._batch.samples, micro_batch, rows)
