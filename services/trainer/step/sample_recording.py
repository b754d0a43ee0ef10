"""The samples of a rollout that this rank logs, with their per-token metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy.typing as npt
import torch

from miles.services.trainer.batch.rollout_batch import RolloutBatch
from miles.services.trainer.batch.rollout_schedule import is_trained
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

    def on_host(values_T: torch.Tensor) -> npt.NDArray[np.float32]:
        host: npt.NDArray[np.float32] = values_T.detach().float().cpu().numpy()
        return host

    host_mask_T, host_advantages_T, host_train_T = (on_host(x_T) for x_T in (mask_T, advantages_T, train_log_probs_T))
    host_rollout_T = None if rollout_log_probs_T is None else on_host(rollout_log_probs_T)
    for position, index in enumerate(batch.mine):
        sample = batch.samples[index]
        if sample.group_id in chosen:
            part = slice(starts[position], starts[position + 1])
            yield (
                sample,
                TokenMetrics(
                    mask=host_mask_T[part],
                    advantages=host_advantages_T[part],
                    train_log_probs=host_train_T[part],
                    rollout_log_probs=None if host_rollout_T is None else host_rollout_T[part],
                ),
            )
    if rank == 0:
        for sample in batch.samples:
            if sample.group_id in chosen and not is_trained(sample):
                yield sample, None
