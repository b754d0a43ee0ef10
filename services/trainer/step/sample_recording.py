"""The samples of a rollout that this rank logs, with their per-token metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy.typing as npt
import torch

from miles.services.trainer.batch.rollout_batch import RolloutBatch, is_trained
from miles.services.trainer.step.sample_log import TokenMetrics
from miles.types import Sample

if TYPE_CHECKING:
    import numpy as np


def recorded_samples(
    batch: RolloutBatch,
    groups: int,
    rank: int,
    *,
    mask_T: torch.Tensor,
    advantages_T: torch.Tensor,
    train_log_probs_T: torch.Tensor,
    rollout_log_probs_T: torch.Tensor | None,
) -> Iterator[tuple[Sample, TokenMetrics | None]]:
    """This rank's samples of the rollout's first groups; rank 0 adds those that no rank trains on."""
    chosen = set(sorted({sample.group_id for sample in batch.samples})[:groups])
    starts = batch.packing.cu_seqlens().tolist()

    def piece(values: torch.Tensor, position: int) -> npt.NDArray[np.float32]:
        part: npt.NDArray[np.float32] = values[starts[position] : starts[position + 1]].detach().float().cpu().numpy()
        return part

    for position, index in enumerate(batch.mine):
        sample = batch.samples[index]
        if sample.group_id in chosen:
            yield (
                sample,
                TokenMetrics(
                    mask=piece(mask_T, position),
                    advantages=piece(advantages_T, position),
                    train_log_probs=piece(train_log_probs_T, position),
                    rollout_log_probs=None if rollout_log_probs_T is None else piece(rollout_log_probs_T, position),
                ),
            )
    if rank == 0:
        for sample in batch.samples:
            if sample.group_id in chosen and not is_trained(sample):
                yield sample, None
