"""Writes what a rank trains on, sample by sample, as --save-debug-train-data asks.

The file is `torch.save` of plain values and tensors: {"rollout_id", "rank", "samples": [{"group_id", "index",
"tokens" int32 [tokens], "response_length", "reward", "status", and float32 [response_length] each: "loss_mask",
"advantages", "returns", "log_probs", and where there are any "rollout_log_probs", "ref_log_probs", "values",
"opd_reverse_kl"}]}. Log-probabilities are in nats, log_probs those before the first optimizer step.
"""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from miles.services.trainer.batch.rollout_batch import RolloutBatch
    from miles.services.trainer.step.preparation import TokenTensors


def write_train_data(template: str, rollout_id: int, rank: int, batch: RolloutBatch, tokens: TokenTensors) -> None:
    """Write one rank's file; it is complete or not there. Raises OSError."""
    columns = {
        "loss_mask": tokens.mask,
        "advantages": tokens.advantages,
        "returns": tokens.returns,
        "log_probs": tokens.seen,
        "rollout_log_probs": tokens.rollout,
        "ref_log_probs": tokens.ref,
        "values": tokens.values,
        "opd_reverse_kl": tokens.opd_reverse_kl,
    }
    known = {name: values.detach().float().cpu() for name, values in columns.items() if values is not None}
    starts = batch.packing.cu_seqlens().tolist()
    samples = []
    for position, index in enumerate(batch.mine):
        part = slice(starts[position], starts[position + 1])
        samples.append(_sample(batch, index) | {name: values[part].clone() for name, values in known.items()})
    path = pathlib.Path(template.format(rollout_id=rollout_id, rank=rank))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    torch.save({"rollout_id": rollout_id, "rank": rank, "samples": samples}, partial)
    partial.replace(path)


def _sample(batch: RolloutBatch, index: int) -> dict[str, Any]:
    sample = batch.samples[index]
    return {
        "group_id": sample.group_id,
        "index": sample.index,
        "tokens": torch.from_numpy(sample.tokens.copy()),
        "response_length": sample.response_length,
        "reward": sample.reward,
        "status": sample.status.value,
    }
