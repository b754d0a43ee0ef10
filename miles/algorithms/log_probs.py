"""Log-probs of given tokens, and entropies, from logits: a chunk of rows at a time, whole or vocabulary-parallel.

Only one chunk of rows is ever held in float32, forward and backward; the gradient is written chunk by chunk in the
logits' dtype. A row's log-prob depends on that row alone, not on how many rows are in the call or how they are
chunked: with an undivided vocabulary it is what `torch.log_softmax` gives for the row, bit for bit.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from miles.algorithms.packing import as_float

CHUNK_ELEMENTS = 2**24
"""Default size of a chunk: 64 MiB in float32."""


@dataclasses.dataclass(frozen=True)
class VocabShard:
    """This rank's part of a vocabulary that is split over a tensor-parallel group.

    Every rank calls with the same rows and tokens and gets the same log-probs and entropies; every rank then computes
    the same loss, so the gradient of each rank's logits is its part of the whole gradient.
    """

    group: dist.ProcessGroup
    start: int | None = None
    """Token id of this rank's first column; None: shards have equal sizes and lie in rank order."""

    def first_token(self, local_vocab: int) -> int:
        """Token id of this rank's first column."""
        return dist.get_rank(self.group) * local_vocab if self.start is None else self.start


@dataclasses.dataclass(frozen=True)
class TokenLogProbs:
    """float32 [T] each (float64 for float64 logits), in nats."""

    log_probs_T: torch.Tensor
    entropy_T: torch.Tensor | None
    """Of the whole distribution at each position; None unless asked for."""


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
        tokens_T: token ids, any integer dtype, [T]; row t is scored at tokens_T[t].
        temperature: divides the logits, after the upcast to float32.
        with_entropy: also compute the entropy.
        entropy_requires_grad: False: the entropy is only observed.
        shard: how the vocabulary is split; None: it is not.
        chunk_rows: rows upcast at a time; None: as many as make 64 MiB.
        overwrite_logits: the backward pass leaves the gradient in the memory of the logits, so that no second tensor of
            their size exists at any time. The logits are destroyed and backward works once.

    Raises:
        ValueError: a shape does not fit or the temperature is not positive.
    """
    if logits_TV.dim() != 2 or tokens_T.shape != logits_TV.shape[:1]:
        raise ValueError(f"need logits [T, V] and tokens [T], got {tuple(logits_TV.shape)} and {tuple(tokens_T.shape)}")
    check_temperature(temperature)
    rows = default_chunk_rows(logits_TV.shape[1]) if chunk_rows is None else chunk_rows
    settings = _Settings(temperature, with_entropy, shard, rows, overwrite_logits)
    log_probs_T, entropy_T = _TokenLogProbs.apply(logits_TV, tokens_T.long(), settings)  # type: ignore[no-untyped-call]
    if not with_entropy:
        return TokenLogProbs(log_probs_T, None)
    return TokenLogProbs(log_probs_T, entropy_T if entropy_requires_grad else entropy_T.detach())


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless the temperature is positive."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; log-probs need a positive one (score greedy samples at 1.0)")


def default_chunk_rows(vocab: int) -> int:
    """Rows that make up a chunk of the default size."""
    return max(1, CHUNK_ELEMENTS // max(vocab, 1))


@dataclasses.dataclass(frozen=True)
class _Settings:
    temperature: float
    with_entropy: bool
    shard: VocabShard | None
    chunk_rows: int
    overwrite_logits: bool


@dataclasses.dataclass(frozen=True)
class LocalStats:
    """What one rank knows of each row, relative to the softmax over its own columns."""

    log_probs_C: torch.Tensor
    """At the token; -inf where the token is in another rank's columns."""
    log_sum_C: torch.Tensor
    """log sum exp(x - max), at least 0."""
    max_C: torch.Tensor
    entropy_C: torch.Tensor | None


def scaled(logits_CV: torch.Tensor, temperature: float) -> torch.Tensor:
    """Upcast a chunk, then divide; a new tensor only where one of the two changes something."""
    x_CV = as_float(logits_CV)
    return x_CV if temperature == 1 else x_CV / temperature


def local_stats(x_CV: torch.Tensor, columns_C: torch.Tensor, with_entropy: bool, whole: bool) -> LocalStats:
    """Statistics of a chunk of scaled logits.

    Args:
        x_CV: float32 or float64.
        columns_C: column of each row's token, outside [0, V) where another rank has it.
        with_entropy: also compute the entropy.
        whole: the columns are the whole vocabulary, so only the log-prob (and entropy) is needed.
    """
    log_softmax_CV = torch.log_softmax(x_CV, dim=-1)
    entropy_C = row_entropy(log_softmax_CV) if with_entropy else None
    if whole:
        log_probs_C = log_softmax_CV.gather(-1, columns_C[:, None]).squeeze(-1)
        return LocalStats(log_probs_C, log_probs_C, log_probs_C, entropy_C)
    max_C, argmax_C = x_CV.max(dim=-1)
    log_sum_C = -log_softmax_CV.gather(-1, argmax_C[:, None]).squeeze(-1)
    ours_C = (columns_C >= 0) & (columns_C < x_CV.shape[1])
    found_C = log_softmax_CV.gather(-1, torch.where(ours_C, columns_C, 0)[:, None]).squeeze(-1)
    return LocalStats(torch.where(ours_C, found_C, -torch.inf), log_sum_C, max_C, entropy_C)


def row_entropy(log_softmax_CV: torch.Tensor) -> torch.Tensor:
    """-sum p log p of each row, where p log p is 0 for p = 0."""
    finite_CV = log_softmax_CV.clamp_min(torch.finfo(log_softmax_CV.dtype).min)
    return -(log_softmax_CV.exp().mul_(finite_CV)).sum(dim=-1)


def combine_shards(
    stats: LocalStats, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Whole-vocabulary log-probs and entropies, and the log weight of this rank's columns.

    With Z_r the sum of exp over rank r's columns and w_r = Z_r / sum Z, a token's log-prob is its local one plus
    log w_r, and the entropy is sum_r w_r (H_r - log w_r). A token that no rank has gets -inf.
    """
    top_C = stats.max_C.clone()
    dist.all_reduce(top_C, op=dist.ReduceOp.MAX, group=group)
    log_mass_C = (stats.max_C - top_C) + stats.log_sum_C
    total_C = log_mass_C.exp()
    dist.all_reduce(total_C, op=dist.ReduceOp.SUM, group=group)
    log_weight_C = log_mass_C - total_C.log()
    log_probs_C = stats.log_probs_C + log_weight_C
    dist.all_reduce(log_probs_C, op=dist.ReduceOp.MAX, group=group)
    if stats.entropy_C is None:
        return log_probs_C, None, log_weight_C
    entropy_C = log_weight_C.exp() * (stats.entropy_C - log_weight_C)
    dist.all_reduce(entropy_C, op=dist.ReduceOp.SUM, group=group)
    return log_probs_C, entropy_C, log_weight_C


def scaled_logits_gradient(
    x_CV: torch.Tensor,
    columns_C: torch.Tensor,
    log_weight_C: torch.Tensor | None,
    entropy_C: torch.Tensor | None,
    grad_log_probs_C: torch.Tensor,
    grad_entropy_C: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient of a chunk's scaled logits, a new tensor.

    d log p_k / d x_j = [j = k] - p_j and dH / d x_j = -p_j (log p_j + H), so with upstream gradients g and h:
    [j = k] g - p_j (g + h (log p_j + H)).
    """
    log_p_CV = torch.log_softmax(x_CV, dim=-1)
    if log_weight_C is not None:
        log_p_CV.add_(log_weight_C[:, None])
    grad_CV = log_p_CV.exp()
    if grad_entropy_C is None or entropy_C is None:
        grad_CV.mul_(-grad_log_probs_C[:, None])
    else:
        log_p_CV.clamp_min_(torch.finfo(log_p_CV.dtype).min).add_(entropy_C[:, None])
        log_p_CV.mul_(grad_entropy_C[:, None]).add_(grad_log_probs_C[:, None])
        grad_CV.mul_(log_p_CV).neg_()
    ours_C = (columns_C >= 0) & (columns_C < x_CV.shape[1])
    at_token_C = torch.where(ours_C, grad_log_probs_C, 0.0)
    return grad_CV.scatter_add_(-1, torch.where(ours_C, columns_C, 0)[:, None], at_token_C[:, None])


class _TokenLogProbs(torch.autograd.Function):
    """Chunked forward; the backward recomputes each chunk's softmax."""

    @staticmethod
    def forward(
        ctx: Any, logits_TV: torch.Tensor, tokens_T: torch.Tensor, settings: _Settings
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shard = settings.shard
        columns_T = tokens_T if shard is None else tokens_T - shard.first_token(logits_TV.shape[1])
        chunks = [
            local_stats(scaled(logits_CV, settings.temperature), columns_C, settings.with_entropy, shard is None)
            for logits_CV, columns_C in zip(
                torch.split(logits_TV, settings.chunk_rows), torch.split(columns_T, settings.chunk_rows), strict=True
            )
        ]
        stats = concatenate(chunks)
        log_probs_T, entropy_T, log_weight_T = stats.log_probs_C, stats.entropy_C, None
        if shard is not None:
            log_probs_T, entropy_T, log_weight_T = combine_shards(stats, shard.group)
        ctx.settings = settings
        ctx.save_for_backward(logits_TV, columns_T, entropy_T, log_weight_T)
        ctx.set_materialize_grads(False)
        return log_probs_T, log_probs_T.new_empty(0) if entropy_T is None else entropy_T

    @staticmethod
    def backward(
        ctx: Any, grad_log_probs_T: torch.Tensor | None, grad_entropy_T: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, None, None]:
        logits_TV, columns_T, entropy_T, log_weight_T = ctx.saved_tensors
        settings: _Settings = ctx.settings
        if entropy_T is None:
            grad_entropy_T = None
        if grad_log_probs_T is None and grad_entropy_T is None:
            return None, None, None
        if grad_log_probs_T is None:
            grad_log_probs_T = torch.zeros_like(columns_T, dtype=as_float(logits_TV[:0]).dtype)
        grad_TV = logits_TV.detach() if settings.overwrite_logits else torch.empty_like(logits_TV)
        for start in range(0, len(logits_TV), settings.chunk_rows):
            rows = slice(start, start + settings.chunk_rows)
            grad_CV = scaled_logits_gradient(
                scaled(logits_TV[rows], settings.temperature),
                columns_T[rows],
                None if log_weight_T is None else log_weight_T[rows],
                None if entropy_T is None else entropy_T[rows],
                grad_log_probs_T[rows],
                None if grad_entropy_T is None else grad_entropy_T[rows],
            )
            grad_TV[rows] = grad_CV if settings.temperature == 1 else grad_CV.div_(settings.temperature)
        return grad_TV, None, None


def concatenate(chunks: list[LocalStats]) -> LocalStats:
    """The statistics of all rows."""
    entropies = [chunk.entropy_C for chunk in chunks if chunk.entropy_C is not None]
    return LocalStats(
        torch.cat([chunk.log_probs_C for chunk in chunks]),
        torch.cat([chunk.log_sum_C for chunk in chunks]),
        torch.cat([chunk.max_C for chunk in chunks]),
        torch.cat(entropies) if entropies else None,
    )
