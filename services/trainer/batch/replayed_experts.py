"""The experts that the engine chose, as a micro-batch's rows, in the type that they came in: a byte each, or two.

Dims: T rows, L those of them that are asked for, N mixture-of-experts layers, K experts a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from miles.services.trainer.batch.packing import MicroBatch
from miles.types import Sample


def rollout_routing(
    samples: Sequence[Sample], micro_batch: MicroBatch, rows_L: npt.NDArray[np.int64] | None = None
) -> torch.Tensor:
    """The experts that the engine chose for rows of a micro-batch, by default all; uint8 or uint16 [L, N, K] on CPU.

    Those of rows below 0, which are padding, are 0, 1, …. Samples whose prompts were routed differently do not share
    rows (see `pack`). Raises ValueError for a sample without routing.
    """
    form: npt.NDArray[np.integer[Any]] | None = None
    for index in micro_batch.samples:
        sample = samples[index]
        if sample.rollout_routed_experts is None:
            raise ValueError(
                f"sample {sample.index} of group {sample.group_id} has no rollout_routed_experts; with "
                "use_rollout_routing_replay and observe_rollout_routing the engine must return them"
            )
        form = sample.rollout_routed_experts
    assert form is not None, "an empty micro-batch has no routing"
    sources_L2 = micro_batch.row_sources_T
    if rows_L is not None:
        sources_L2 = np.where((rows_L < 0)[:, None], -1, sources_L2[rows_L])
    experts_LNK = np.empty((len(sources_L2), *form.shape[1:]), form.dtype)
    for start, end in _runs(sources_L2):
        index, position = sources_L2[start]
        routed = samples[index].rollout_routed_experts if index >= 0 else None
        experts_LNK[start:end] = (
            np.arange(form.shape[2]) if routed is None else routed[position : position + end - start]
        )
    return torch.from_numpy(experts_LNK)


def _runs(sources_L2: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Ranges of rows that follow each other in one sample, so that they are copied at once."""
    steps = np.diff(sources_L2, axis=0)
    ends = [*(np.flatnonzero((steps[:, 0] != 0) | (steps[:, 1] != 1)) + 1).tolist(), len(sources_L2)]
    return list(zip([0, *ends[:-1]], ends, strict=True))
