"""The experts that the engine chose, as a micro-batch's rows.

Dims: T rows, L mixture-of-experts layers, K experts a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from miles.services.trainer.batch.packing import MicroBatch
from miles.types import Sample


def rollout_routing(samples: Sequence[Sample], micro_batch: MicroBatch) -> torch.Tensor:
    """The experts that the engine chose for each row of a micro-batch; int64 [T, layers, K] on CPU.

    Samples whose prompts were routed differently do not share its rows (see `pack`). Raises ValueError for a sample
    without routing.
    """
    layers_and_experts: tuple[int, ...] | None = None
    for index in micro_batch.samples:
        sample = samples[index]
        if sample.rollout_routed_experts is None:
            raise ValueError(
                f"sample {sample.index} of group {sample.group_id} has no rollout_routed_experts; with "
                "use_rollout_routing_replay and observe_rollout_routing the engine must return them"
            )
        layers_and_experts = sample.rollout_routed_experts.shape[1:]
    assert layers_and_experts is not None, "an empty micro-batch has no routing"
    experts_TLK = np.empty((micro_batch.num_rows, *layers_and_experts), np.int64)
    for index in micro_batch.samples:
        rows = micro_batch.row_sources_T[:, 0] == index
        routed = samples[index].rollout_routed_experts
        assert routed is not None
        experts_TLK[rows] = routed[micro_batch.row_sources_T[rows, 1]]
    return torch.from_numpy(experts_TLK)
