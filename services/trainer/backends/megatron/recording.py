"""Records the policy's forward passes of this rank's part of a Megatron-Core model for the draft model.

Each rank has the layers of its pipeline stage, and of a sample's rows those of its context-parallel rank and, with
sequence parallelism, of its tensor-parallel rank. The last stage has the likeliest tokens.

Dims: L local rows, N of them of recorded samples, R response tokens, M of them of recorded samples and local.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from miles.algorithms.device_copies import to_device
from miles.drafts.recorded_layers import EMBEDDING
from miles.services.trainer.backends.megatron.model.build_model import MegatronModel
from miles.services.trainer.backends.megatron.parallel.forward_output import LogProbOutput
from miles.services.trainer.backends.megatron.parallel.groups import ParallelRank
from miles.services.trainer.backends.megatron.parallel.rows import LocalRows, part_of_rows
from miles.services.trainer.backends.megatron.replay.step_routing import Hooks
from miles.services.trainer.batch.packing import MicroBatch
from miles.services.trainer.recording.layer_reader import LayerReader
from miles.services.trainer.recording.recorder import Recorder


class RecordedPasses:
    """Passes over micro-batches, from which a recorder takes what it wants."""

    def __init__(
        self, recorder: Recorder, model: MegatronModel, parallel: ParallelRank, output: LogProbOutput, device: Any
    ) -> None:
        """Put hooks on the layers of this rank that are recorded."""
        self._recorder = recorder
        self._output = output
        self._device = device
        modules = _modules(model.bare_chunks, recorder.options.layers)
        self._reader = LayerReader(modules)
        self._scatters = bool(getattr(modules.get(EMBEDDING), "reduce_scatter_embeddings", False))
        """Whether embeddings are split over tensor-parallel ranks as soon as they are read."""
        self._parts = parallel.tensor_size if model.config.sequence_parallel else 1
        self._part = parallel.tensor_rank if self._parts > 1 else 0
        self._has_rows = self._parts > 1 or parallel.tensor_rank == 0
        """Otherwise another rank has the same."""
        self._keeps_top = parallel.tensor_rank == 0

    def hooks(self, micro_batches: Sequence[MicroBatch]) -> Hooks:
        """Hooks around the forward passes of these micro-batches."""

        def before(chunk: int, number: int, rows: LocalRows) -> None:
            if number < len(micro_batches) and self._has_rows:
                self._begin(micro_batches[number], rows)

        def after(chunk: int, number: int) -> None:
            self._reader.end()

        return Hooks(before=before, after=after)

    def read_top(self, output_1RV: torch.Tensor, micro_batch: MicroBatch, rows: LocalRows) -> None:
        """Read the likeliest tokens off the head's output on the last stage; collective over tensor-parallel ranks."""
        recorder = self._recorder
        found = recorder.rows(micro_batch)
        if found is None:
            return
        with recorder.timed():
            place_R = _places(found.response_M, len(micro_batch.targets_R))
            place_L = place_R[rows.responses]
            picked_M = np.flatnonzero(place_L >= 0)
            scores = self._output.likeliest(output_1RV, torch.from_numpy(picked_M), recorder.options.top_tokens)
            if self._keeps_top and len(picked_M):
                recorder.keep_top(micro_batch, torch.from_numpy(found.top_rows_M2[place_L[picked_M]]), scores)

    def _begin(self, micro_batch: MicroBatch, rows: LocalRows) -> None:
        recorder = self._recorder
        found = recorder.rows(micro_batch)
        if found is None:
            return
        with recorder.timed():
            place_T = _places(found.row_N, micro_batch.num_rows)
            sources_L = part_of_rows(rows.sources_L, self._part, self._parts)
            place_L = np.where(sources_L >= 0, place_T[sources_L], -1)
            picked = np.flatnonzero(place_L >= 0)
            if not len(picked):
                return
            rows_N2 = torch.from_numpy(found.rows_N2[place_L[picked]])
            picked_N = to_device(torch.from_numpy(picked), self._device)

        def keep(layer: int, hidden: torch.Tensor) -> None:
            with recorder.timed():
                hidden_ND = self._by_row(layer, hidden).index_select(0, picked_N)
                recorder.keep_hidden(micro_batch, rows_N2, layer, hidden_ND)

        self._reader.begin(keep)

    def _by_row(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """[L, D] from [L, 1, D], or [M, S, D] of S padded samples."""
        if layer == EMBEDDING and not self._scatters:  # [1, L, D] or [S, M, D] of all tensor-parallel ranks
            rows = hidden.transpose(0, 1).flatten(0, 1)
            return rows.narrow(0, self._part * (len(rows) // self._parts), len(rows) // self._parts)
        return hidden.flatten(0, 1)


def both(first: Hooks, second: Hooks) -> Hooks:
    """The hooks of two, one after the other."""
    befores = [hooks["before"] for hooks in (first, second) if "before" in hooks]
    afters = [hooks["after"] for hooks in (first, second) if "after" in hooks]

    def before(chunk: int, number: int, rows: LocalRows) -> None:
        for call in befores:
            call(chunk, number, rows)

    def after(chunk: int, number: int) -> None:
        for call in afters:
            call(chunk, number)

    return Hooks(before=before, after=after)


def _modules(chunks: Sequence[Any], layers: Sequence[int]) -> dict[int, torch.nn.Module]:
    """This rank's modules of the layers; Megatron-Core counts layers from 1."""
    found: dict[int, torch.nn.Module] = {}
    for chunk in chunks:
        found |= {layer.layer_number - 1: layer for layer in chunk.decoder.layers}
        if chunk.pre_process:  # the table itself: some models scale what they read of it, and a draft does not
            found[EMBEDDING] = chunk.embedding.word_embeddings
    return {layer: module for layer, module in found.items() if layer in layers}


def _places(indices: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Where each of `count` numbers is among the indices; -1 where it is not."""
    places = np.full(count, -1, np.int64)
    places[indices] = np.arange(len(indices))
    return places
