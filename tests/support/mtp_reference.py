"""The MTP loss of packed samples by our own code, and by Megatron-Core's for each sample by itself; prints both."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from trainer_cases import job_config, random_groups

from miles.services.trainer.backends.megatron.model.build_model import build_model
from miles.services.trainer.backends.megatron.mtp.targets import TrainedTokens
from miles.services.trainer.backends.megatron.mtp.training import MtpTraining
from miles.services.trainer.backends.megatron.parallel import groups
from miles.services.trainer.backends.megatron.parallel.pipeline import Pipeline
from miles.services.trainer.batch.packing import MicroBatch, pack
from miles.services.trainer.batch.rollout_batch import in_order, response_mask
from miles.types import Sample

CHOSEN = [0, 3, 5, 9, 14]
WEIGHT = 0.3
CPU = torch.device("cpu")


def gradients(chunk: Any) -> dict[str, torch.Tensor]:
    """Take what has been added up in the MTP layers; checks that nothing else has a gradient."""
    found = {}
    for name, parameter in chunk.named_parameters():
        gradient = parameter.main_grad
        if name.startswith("mtp."):
            found[name] = gradient.clone()
        else:
            assert not gradient.any(), f"{name} has a gradient of the MTP loss"
        gradient.zero_()
    return found


def ours(model: Any, parallel: groups.ParallelRank, samples: tuple[Sample, ...], count: int) -> dict[str, float]:
    """All samples in one micro-batch, beside a loss of 0."""
    micro_batch = pack(samples, CHOSEN, share_prompts=False)

    def mask(micro_batch: MicroBatch) -> np.ndarray:
        return np.concatenate([response_mask(samples[i]) for i in micro_batch.samples]).astype(bool)

    training = MtpTraining(model.chunks, model.vocabulary, parallel, CPU, weight=WEIGHT, chunk_rows=None)
    Pipeline(model, parallel, CPU, training).run(
        [micro_batch],
        lambda output, micro_batch, rows: output,
        lambda number, output: (output.sum() * 0.0, None),
        with_gradient=True,
        trained=TrainedTokens(count, mask),
    )
    return training.take_metrics()


def megatron_cores(chunk: Any, sample: Sample, count: int) -> np.ndarray:
    """The library's own loss of one sample's tokens, backward too; its sum, right predictions, predictions; [3]."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, MTPLossLoggingHelper

    length = len(sample.tokens)
    mask = np.zeros(length, np.float32)
    mask[sample.prompt_length :] = response_mask(sample)
    ends = torch.tensor([0, length], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=length, max_seqlen_kv=length
    )
    config = chunk.config
    config.mtp_num_layers, chunk.mtp_process = 1, True
    config.mtp_loss_scaling_factor = float(WEIGHT / count * mask[2:].sum() / mask[1:].sum())  # what it multiplies by
    MTPLossAutoScaler.set_loss_scale(torch.ones(()))
    MTPLossLoggingHelper.tracker.clear()
    output = chunk(
        input_ids=torch.from_numpy(sample.tokens.astype(np.int64))[None],
        position_ids=torch.arange(length)[None],
        attention_mask=None,
        loss_mask=torch.from_numpy(mask)[None],
        packed_seq_params=packed,
    )
    (output.sum() * 0.0).backward()
    config.mtp_num_layers, chunk.mtp_process = None, False
    tracker = MTPLossLoggingHelper.tracker
    totals = tracker["total_values"]
    return torch.cat([tracker["loss_values"] * totals, tracker["correct_values"], totals]).numpy()


def main(folder: str) -> None:
    """Compare on the model of a folder; prints a JSON object."""
    config = job_config(
        pathlib.Path(folder),
        train_backend="megatron",
        mtp_num_layers=1,
        enable_mtp_training=True,
        device="cpu",
        distributed_backend=None,
    )
    parallel = groups.initialize(config)
    model = build_model(config, parallel, torch.float32)
    model.config.grad_scale_func = None
    random = np.random.default_rng(0)
    samples = tuple(
        dataclasses.replace(sample, loss_mask=random.integers(0, 2, sample.response_length).astype(np.uint8))
        for sample in in_order(random_groups(3))
    )
    count = int(sum(response_mask(samples[i]).sum() for i in CHOSEN))
    metrics = ours(model, parallel, samples, count)
    chunk = model.chunks[0].module
    mine = gradients(chunk)
    sums = np.zeros(3)
    for index in CHOSEN:
        if response_mask(samples[index]).any():
            sums += megatron_cores(chunk, samples[index], count)
    theirs = gradients(chunk)
    print(
        "RESULT",
        json.dumps(
            {
                "loss": [metrics["train/mtp_loss"], sums[0] / sums[2]],
                "acceptance": [metrics["train/mtp_acceptance"], sums[1] / sums[2]],
                "difference": max(float((mine[name] - theirs[name]).abs().max()) for name in mine),
                "largest": max(float(gradient.abs().max()) for gradient in theirs.values()),
            }
        ),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        main(*sys.argv[1:])
    finally:
        dist.destroy_process_group()
