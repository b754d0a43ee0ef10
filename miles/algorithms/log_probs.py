"""Log-probs of given tokens, and entropies, from logits: one chunk of rows at a time, also vocabulary-parallel.

Only one chunk of rows is held in float32, forward and backward; the gradient is written chunk by chunk in the logits'
dtype. A row's log-prob depends only on that row, not on the number of rows or chunks: with an unsharded vocabulary it
equals `torch.log_softmax` of the row, bit for bit.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

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

__all__ = ["CHUNK_ELEMENTS", "TokenLogProbs", "VocabShard", "token_log_probs"]

CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
"""Default size of a chunk by device: 16 MiB in float32, which stays in the cache, or 256 MiB, which fills a GPU."""


def token_log_probs(
    logits_TV: torch.Tensor,
    tokens_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    entropy_requires_grad: bool = True,
    shard: VocabShard | None = None,
    chunk_rows: int | None = None,
    overwrite_logits: bool = False,
) -> TokenLogProbs:
    """log softmax(logits / temperature) at the given tokens, and optionally the entropy of each row.

    Args:
        logits_TV: [T, V], or [T, V / ranks] with `shard`; bfloat16, float16, float32 or float64.
        tokens_T: token ids, any integer dtype, [T]; row t is scored at tokens_T[t]. [T, M] scores each row at M
            tokens, and so gives log-probs [T, M]; not with `shard`.
        temperature: divides the logits, after the upcast to float32.
        with_entropy: also compute the entropy.
        entropy_requires_grad: False: the entropy is only observed.
        shard: how the vocabulary is split; None: it is not.
        chunk_rows: rows upcast at a time; None: as many as make up `CHUNK_ELEMENTS`.
        overwrite_logits: the backward pass leaves the gradient in the memory of the logits, so that no second tensor of
            their size exists at any time. The logits are destroyed and backward works once.

    Raises:
        ValueError: a shape does not fit or the temperature is not positive.
    """
    fits = tokens_T.dim() == 1 or (tokens_T.dim() == 2 and shard is None)
    if logits_TV.dim() != 2 or not fits or tokens_T.shape[:1] != logits_TV.shape[:1]:
        raise ValueError(f"need logits [T, V] and tokens [T], got {tuple(logits_TV.shape)} and {tuple(tokens_T.shape)}")
    check_temperature(temperature)
    rows = rows_of(CHUNK_ELEMENTS, logits_TV.shape[1], logits_TV.device) if chunk_rows is None else chunk_rows
    options = _Options(temperature, with_entropy, shard, rows, overwrite_logits)
    log_probs_T, entropy_T = _TokenLogProbs.apply(logits_TV, tokens_T.long(), options)  # type: ignore[no-untyped-call]
    if not with_entropy:
        return TokenLogProbs(log_probs_T, None)
    return TokenLogProbs(log_probs_T, entropy_T if entropy_requires_grad else entropy_T.detach())


@dataclasses.dataclass(frozen=True)
class _Options:
    temperature: float
    with_entropy: bool
    shard: VocabShard | None
    chunk_rows: int
    overwrite_logits: bool


class _TokenLogProbs(torch.autograd.Function):
    """Chunked forward; the backward recomputes each chunk's softmax."""

    @staticmethod
    def forward(
        ctx: Any, logits_TV: torch.Tensor, tokens_T: torch.Tensor, options: _Options
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shard = options.shard
        columns_T = tokens_T if shard is None else tokens_T - shard.first_token(logits_TV.shape[1])
        stats = RowStats.empty(
            logits_TV, tokens_T.shape, with_entropy=options.with_entropy, with_norm=shard is not None
        )
        for rows in chunks(len(logits_TV), options.chunk_rows):
            stats.fill(rows, scaled(logits_TV[rows], options.temperature), columns_T[rows], whole=shard is None)
        log_probs_T, entropy_T, log_weight_T = stats.log_probs_T, stats.entropy_T, None
        if shard is not None:
            log_probs_T, entropy_T, log_weight_T = combine_shards(stats, shard.group)
        ctx.options = options
        ctx.save_for_backward(logits_TV, columns_T, log_probs_T, entropy_T, log_weight_T)
        ctx.set_materialize_grads(False)
        return log_probs_T, log_probs_T.new_empty(0) if entropy_T is None else entropy_T

    @staticmethod
    def backward(
        ctx: Any, grad_log_probs_T: torch.Tensor | None, grad_entropy_T: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, None, None]:
        logits_TV, columns_T, log_probs_T, entropy_T, log_weight_T = ctx.saved_tensors
        options: _Options = ctx.options
        if grad_log_probs_T is None and grad_entropy_T is None:
            return None, None, None
        grad_log_probs_T, grad_entropy_T = upstream_gradients(
            grad_log_probs_T, grad_entropy_T, log_probs_T, options.temperature
        )
        grad_TV = logits_TV.detach() if options.overwrite_logits else torch.empty_like(logits_TV)
        for rows in chunks(len(logits_TV), options.chunk_rows):
            log_p_CV = torch.log_softmax(scaled(logits_TV[rows], options.temperature), dim=-1)
            if log_weight_T is not None:
                log_weight_C1 = log_weight_T[rows, None]
                log_p_CV.add_(log_weight_C1).masked_fill_(log_weight_C1 == -torch.inf, -torch.inf)
            grad_TV[rows] = gradient_of_scores(
                log_p_CV,
                columns_T[rows],
                None if entropy_T is None else entropy_T[rows],
                grad_log_probs_T[rows],
                None if grad_entropy_T is None else grad_entropy_T[rows],
            )
        return grad_TV, None, None
