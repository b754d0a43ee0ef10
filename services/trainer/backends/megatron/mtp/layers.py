"""MTP layers: multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2) behind a model's last layer.

megatron-bridge builds them of TransformerEngine's parts alone. Here they are added to a model that is already built,
so they can be made of local layers and are skipped in passes that do not train them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from miles.services.trainer.backends.megatron.parallel.rows import PADDING, LocalRows
from miles.services.trainer.batch.packing import MicroBatch


def add_mtp_layers(chunk: Any, count: int, *, with_engine: bool, trained: bool) -> None:
    """Add `count` layers to a bare chunk, if it is the model's last; only `MtpTraining` enables them."""
    if not chunk.post_process:
        return
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock

    config, stage = chunk.config, chunk.vp_stage
    config.mtp_num_layers = count
    layers = config.transformer_layer_spec(config, vp_stage=stage)
    spec = get_gpt_mtp_block_spec(config, layers, use_transformer_engine=with_engine, vp_stage=stage)
    if not with_engine:
        from miles.services.trainer.backends.megatron.layers.local_layers import Parts, with_local_parts

        spec.layer_specs = [
            dataclasses.replace(each, submodules=with_local_parts(each.submodules, Parts()))
            for each in spec.layer_specs
        ]
    device = next(chunk.parameters()).device
    chunk.mtp = MultiTokenPredictionBlock(config, spec, vp_stage=stage, pg_collection=chunk.pg_collection).to(device)
    chunk.mtp.requires_grad_(trained)
    _set_layers(chunk, None)


class MtpTraining:
    """Training passes of the MTP layers, and their loss: the mean over trained tokens and layers.

    They predict response tokens from the hidden states of the layers below. No gradient flows into those layers, the
    embeddings or the output matrix.
    """

    def __init__(self, chunks: Sequence[Any], count: int, weight: float, padding: int) -> None:
        """`chunks` are bare; `weight` is that of the loss; the last `padding` local columns of logits are padding."""
        self._chunks = [chunk for chunk in chunks if getattr(chunk, "mtp", None) is not None]
        self._count = count
        self._weight = weight
        self._sums = torch.zeros(2)
        for chunk in self._chunks:
            chunk.compute_language_model_loss = _without(padding, chunk.compute_language_model_loss)

    @contextlib.contextmanager
    def enabled(self, num_tokens: int) -> Iterator[None]:
        """Enable the layers inside the block; `num_tokens` are the trained tokens of the optimizer step."""
        for chunk in self._chunks:
            _set_layers(chunk, self._count)
            chunk.config.mtp_loss_scaling_factor = self._weight / max(num_tokens, 1)  # Megatron-Core adds up tokens
        try:
            yield
        finally:
            for chunk in self._chunks:
                _set_layers(chunk, None)

    def add_loss(self) -> None:
        """Add a forward pass's loss to those that `take_loss` returns; call after the pass."""
        from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

        tracker = MTPLossLoggingHelper.tracker
        if "loss_values" in tracker:
            tokens = tracker["total_values"].cpu()
            self._sums += torch.stack([(tracker["loss_values"].cpu() * tokens).sum(), tokens.sum()])
            MTPLossLoggingHelper.clean_metrics_in_tracker()

    def take_loss(self, group: dist.ProcessGroup, device: torch.device) -> float:
        """Mean over predicted tokens since the last call, of all ranks of a group; collective."""
        sums = self._sums.to(device)
        dist.all_reduce(sums, group=group)
        total, tokens = sums.tolist()
        self._sums.zero_()
        return float(total) / max(float(tokens), 1.0)


def _without(padding: int, loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A loss of logits [L, 1, V] in which the last columns have no probability."""

    def of_tokens(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if padding:
            logits = torch.cat([logits[..., :-padding], torch.full_like(logits[..., -padding:], -torch.inf)], dim=-1)
        return loss(labels, logits)

    return of_tokens


def response_rows(micro_batch: MicroBatch, rows: LocalRows) -> npt.NDArray[np.float32]:
    """1 where a local row's token is of a response, else 0; [L]."""
    starts = np.array([segment.start for segment in micro_batch.segments], np.int64)
    following = micro_batch.logit_rows_R + 1
    mask_T = np.zeros(micro_batch.num_rows + 1, np.float32)
    mask_T[following] = 1.0
    mask_T[starts] = 0.0  # what follows the last row of a sample is another sample
    return np.where(rows.sources_L == PADDING, np.float32(0), mask_T[rows.sources_L])


def _set_layers(chunk: Any, count: int | None) -> None:
    """Enable so many MTP layers, whose hidden states the output layer then expects too; None disables them."""
    chunk.mtp_process = count is not None
    chunk.config.mtp_num_layers = count
