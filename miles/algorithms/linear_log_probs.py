"""Log-probs and entropies from hidden states: matmul of the head and softmax, one chunk of rows at a time.

The logits of the whole micro-batch never exist. The matmul runs in the dtype of the hidden states, as in the head
itself, and its result is upcast. The backward pass recomputes logits for a block of the vocabulary and all rows at a
time: each block of the head's gradient is written once, and only the hidden states' gradient, which is far smaller, is
accumulated over blocks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from miles.algorithms.vocab_rows import (
    RowStats,
    TokenLogProbs,
    VocabShard,
    check_temperature,
    chunks,
    combine_shards,
    gradient_of_scores,
    rows_of,
    scaled,
    upstream_gradients,
)

MIN_ROWS = 16
"""A matmul of fewer rows may take another kernel, which rounds differently; short chunks are padded to this many."""

CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**26}
"""Default size of a chunk by device: 64 MiB in float32, enough rows for the matmul, or 256 MiB."""

MIN_BLOCK = 128
"""Fewest columns of the vocabulary in a block of the backward pass."""


def linear_token_log_probs(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    tokens_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    entropy_requires_grad: bool = True,
    shard: VocabShard | None = None,
    chunk_rows: int | None = None,
) -> TokenLogProbs:
    """`token_log_probs(hidden @ weight.T, tokens)` without ever holding all logits.

    Under autocast the hidden states and the weight are cast to its dtype first, as a linear layer would.

    Args:
        hidden_TD: last hidden states at the positions that predict `tokens_T`, [T, D].
        weight_VD: the head's weight, [V, D] (the embedding where tied), or this rank's [V / ranks, D] with `shard`.
        tokens_T: token ids, any integer dtype, [T]; or [T, M] to score each row at M tokens, which gives log-probs
            [T, M]; not with `shard`.
        temperature: divides the logits, after the upcast to float32.
        with_entropy: also compute the entropy.
        entropy_requires_grad: False: the entropy is only observed.
        shard: how the vocabulary is split; the gradient of the hidden states is then summed over its group.
        chunk_rows: rows whose logits exist at a time; None: as many as make up `CHUNK_ELEMENTS`.

    Raises:
        ValueError: a shape does not fit or the temperature is not positive.
    """
    if hidden_TD.dim() != 2 or weight_VD.dim() != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"need hidden [T, D] and weight [V, D], got {tuple(hidden_TD.shape)} and {tuple(weight_VD.shape)}"
        )
    fits = tokens_T.dim() == 1 or (tokens_T.dim() == 2 and shard is None)
    if not fits or tokens_T.shape[:1] != hidden_TD.shape[:1]:
        raise ValueError(f"need one token a row, got {tuple(tokens_T.shape)} for hidden {tuple(hidden_TD.shape)}")
    check_temperature(temperature)
    device_type = hidden_TD.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden_TD, weight_VD = hidden_TD.to(dtype), weight_VD.to(dtype)
    if chunk_rows is None:
        chunk_rows = rows_of(CHUNK_ELEMENTS, weight_VD.shape[0], weight_VD.device)
    rows = max(MIN_ROWS, chunk_rows)
    with torch.autocast(device_type, enabled=False):
        options = _Options(temperature, with_entropy, shard, rows)
        log_probs_T, entropy_T = _LinearTokenLogProbs.apply(  # type: ignore[no-untyped-call]
            hidden_TD, weight_VD, tokens_T.long(), options
        )
    if not with_entropy:
        return TokenLogProbs(log_probs_T, None)
    return TokenLogProbs(log_probs_T, entropy_T if entropy_requires_grad else entropy_T.detach())


@dataclasses.dataclass(frozen=True)
class _Options:
    temperature: float
    with_entropy: bool
    shard: VocabShard | None
    chunk_rows: int


def _chunk_logits(hidden_CD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """Logits [C, V] in the hidden states' dtype, by a matmul of at least MIN_ROWS rows."""
    rows = len(hidden_CD)
    if rows >= MIN_ROWS:
        return F.linear(hidden_CD, weight_VD)
    return F.linear(F.pad(hidden_CD, (0, 0, 0, MIN_ROWS - rows)), weight_VD)[:rows]


class _LinearTokenLogProbs(torch.autograd.Function):
    """Forward in chunks of rows, backward in blocks of the vocabulary."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, tokens_T: torch.Tensor, options: _Options
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shard = options.shard
        columns_T = tokens_T if shard is None else tokens_T - shard.first_token(weight_VD.shape[0])
        stats = RowStats.empty(hidden_TD, tokens_T.shape, with_entropy=options.with_entropy, with_norm=True)
        for rows in chunks(len(hidden_TD), options.chunk_rows):
            x_CV = scaled(_chunk_logits(hidden_TD[rows], weight_VD), options.temperature)
            stats.fill(rows, x_CV, columns_T[rows], whole=shard is None)
        log_probs_T, entropy_T, max_T, log_norm_T = stats.log_probs_T, stats.entropy_T, stats.max_T, stats.log_sum_T
        assert max_T is not None
        assert log_norm_T is not None
        if shard is not None:
            log_probs_T, entropy_T, log_weight_T = combine_shards(stats, shard.group)
            log_norm_T = log_norm_T - log_weight_T
            max_T = torch.where(log_weight_T == -torch.inf, 0.0, max_T)  # -inf - -inf would be NaN
        ctx.options = options
        ctx.save_for_backward(hidden_TD, weight_VD, columns_T, log_probs_T, entropy_T, max_T, log_norm_T)
        ctx.set_materialize_grads(False)
        return log_probs_T, log_probs_T.new_empty(0) if entropy_T is None else entropy_T

    @staticmethod
    def backward(
        ctx: Any, grad_log_probs_T: torch.Tensor | None, grad_entropy_T: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        hidden_TD, weight_VD, columns_T, log_probs_T, entropy_T, max_T, log_norm_T = ctx.saved_tensors
        options: _Options = ctx.options
        if grad_log_probs_T is None and grad_entropy_T is None:
            return None, None, None, None
        grad_log_probs_T, grad_entropy_T = upstream_gradients(
            grad_log_probs_T, grad_entropy_T, log_probs_T, options.temperature
        )
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden_TD = torch.zeros_like(hidden_TD, dtype=log_probs_T.dtype) if needs_hidden else None
        grad_weight_VD = torch.empty_like(weight_VD) if needs_weight else None
        vocab = weight_VD.shape[0]
        block = max(MIN_BLOCK, options.chunk_rows * vocab // max(len(hidden_TD), 1))
        for columns in chunks(vocab, block):
            log_p_TC = scaled(F.linear(hidden_TD, weight_VD[columns]), options.temperature)
            log_p_TC = log_p_TC.sub_(max_T[:, None]).sub_(log_norm_T[:, None])
            here_T = columns_T - columns.start
            grad_TC = gradient_of_scores(log_p_TC, here_T, entropy_T, grad_log_probs_T, grad_entropy_T)
            grad_TC = grad_TC.to(hidden_TD.dtype)
            if grad_weight_VD is not None:
                torch.mm(grad_TC.t(), hidden_TD, out=grad_weight_VD[columns])
            if grad_hidden_TD is not None:
                _add_product(grad_hidden_TD, grad_TC, weight_VD[columns])
        if grad_hidden_TD is not None and options.shard is not None:
            dist.all_reduce(grad_hidden_TD, op=dist.ReduceOp.SUM, group=options.shard.group)
        return (None if grad_hidden_TD is None else grad_hidden_TD.to(hidden_TD.dtype)), grad_weight_VD, None, None


def _add_product(total_TD: torch.Tensor, a_TC: torch.Tensor, b_CD: torch.Tensor) -> None:
    """total += a @ b; the running total stays in float32 where a and b are half precision."""
    if total_TD.dtype == a_TC.dtype:
        total_TD.addmm_(a_TC, b_CD)
    else:
        total_TD.add_(a_TC @ b_CD)
