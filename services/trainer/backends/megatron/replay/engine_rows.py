"""The engine's routing as the rows that this rank's routers get.

Dims: L local rows (this tensor-parallel rank's, with sequence parallelism), N mixture-of-experts layers, K experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from miles.services.trainer.backends.megatron.parallel.rows import PADDING, LocalRows, part_of_rows
from miles.services.trainer.batch.packing import MicroBatch
from miles.services.trainer.batch.replayed_experts import rollout_routing
from miles.types import Sample


@dataclasses.dataclass(frozen=True, slots=True)
class EngineRows:
    """A micro-batch's routing, cut to this rank's rows."""

    experts_LNK: torch.Tensor
    """uint8 or uint16; padding goes to experts 0, 1, …."""
    present_L: torch.Tensor
    """bool; False for padding."""
    count: int
    """Rows that are present."""


@dataclasses.dataclass(frozen=True, slots=True)
class RowCutter:
    """Cuts rows as routers of this rank get them."""

    part: int
    """With sequence parallelism, this rank among `parts`, which hold equal parts of the rows."""
    parts: int
    num_layers: int
    """Mixture-of-experts layers of the whole model."""
    device: torch.device

    def cut(self, samples: Sequence[Sample], micro_batch: MicroBatch, rows: LocalRows) -> EngineRows:
        """Raises ValueError for samples without routing, or with that of another model."""
        sources_L = part_of_rows(rows.sources_L, self.part, self.parts)
        experts_LNK = rollout_routing(samples, micro_batch, sources_L)
        if experts_LNK.shape[1] != self.num_layers:
            raise ValueError(
                f"the rollout's routing has {experts_LNK.shape[1]} layers, but the model {self.num_layers} "
                "mixture-of-experts layers; the engine must serve the model that is trained"
            )
        present_L = torch.from_numpy(sources_L != PADDING)
        return EngineRows(experts_LNK.to(self.device), present_L.to(self.device), int(present_L.sum()))
