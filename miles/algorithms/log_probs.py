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

CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
"""Default size of a chunk by device: 16 MiB in float32, which stays in the cache, or 256 MiB, which fills a GPU."""


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
        chunk_rows: rows upcast at a time; None: as many as make up `CHUNK_ELEMENTS`.
        overwrite_logits: the backward pass leaves the gradient in the memory of the logits, so that no second tensor of
            their size exists at any time. The logits are destroyed and backward works once.

    Raises:
        ValueError: a shape does not fit or the temperature is not positive.
    """
    if logits_TV.dim() != 2 or tokens_T.shape != logits_TV.shape[:1]:
        raise ValueError(f"need logits [T, V] and tokens [T], got {tuple(logits_TV.shape)} and {tuple(tokens_T.shape)}")
    check_temperature(temperature)
    rows = rows_of(CHUNK_ELEMENTS, logits_TV.shape[1], logits_TV.device) if chunk_rows is None else chunk_rows
    settings = _Settings(temperature, with_entropy, shard, rows, overwrite_logits)
    log_probs_T, entropy_T = _TokenLogProbs.apply(logits_TV, tokens_T.long(), settings)  # type: ignore[no-untyped-call]
    if not with_entropy:
        return TokenLogProbs(log_probs_T, None)
    return TokenLogProbs(log_probs_T, entropy_T if entropy_requires_grad else entropy_T.detach())


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless the temperature is positive."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; log-probs need a positive one (score greedy samples at 1.0)")


def rows_of(elements: dict[str, int], vocab: int, device: torch.device) -> int:
    """Rows that make up a chunk of the size given for this device (any other device: as for cuda)."""
    return max(1, elements.get(device.type, elements["cuda"]) // max(vocab, 1))


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
    entropy_C: torch.Tensor | None
    max_C: torch.Tensor | None
    log_sum_C: torch.Tensor | None
    """log sum exp(x - max), at least 0."""


def scaled(logits_CV: torch.Tensor, temperature: float) -> torch.Tensor:
    """Upcast a chunk, then divide; a new tensor only where one of the two changes something."""
    x_CV = as_float(logits_CV)
    return x_CV if temperature == 1 else x_CV / temperature


def local_stats(
    x_CV: torch.Tensor, columns_C: torch.Tensor, *, with_entropy: bool, with_norm: bool, whole: bool
) -> LocalStats:
    """Statistics of a chunk of scaled logits.

    Args:
        x_CV: float32 or float64.
        columns_C: column of each row's token, outside [0, V) where another rank has it.
        with_entropy: also compute the entropy.
        with_norm: also compute the maximum and the log sum.
        whole: the columns are the whole vocabulary, so every token must be among them.
    """
    log_softmax_CV = torch.log_softmax(x_CV, dim=-1)
    max_C = log_sum_C = None
    if with_norm:
        max_C, argmax_C = x_CV.max(dim=-1)
        log_sum_C = -log_softmax_CV.gather(-1, argmax_C[:, None]).squeeze(-1)
    if whole:
        log_probs_C = log_softmax_CV.gather(-1, columns_C[:, None]).squeeze(-1)
    else:
        ours_C = (columns_C >= 0) & (columns_C < x_CV.shape[1])
        found_C = log_softmax_CV.gather(-1, torch.where(ours_C, columns_C, 0)[:, None]).squeeze(-1)
        log_probs_C = torch.where(ours_C, found_C, -torch.inf)
    entropy_C = row_entropy(log_softmax_CV) if with_entropy else None
    return LocalStats(log_probs_C, entropy_C, max_C, log_sum_C)


def concatenate(chunks: list[LocalStats]) -> LocalStats:
    """The statistics of all rows."""

    def join(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
        present = [part for part in parts if part is not None]
        return torch.cat(present) if present else None

    return LocalStats(
        torch.cat([chunk.log_probs_C for chunk in chunks]),
        join([chunk.entropy_C for chunk in chunks]),
        join([chunk.max_C for chunk in chunks]),
        join([chunk.log_sum_C for chunk in chunks]),
    )


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
    assert stats.max_C is not None
    assert stats.log_sum_C is not None
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


def gradient_of_scores(
    log_p_CV: torch.Tensor,
    columns_C: torch.Tensor,
    entropy_C: torch.Tensor | None,
    grad_log_probs_C: torch.Tensor,
    grad_entropy_C: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient of scaled logits whose log-softmax is `log_p_CV`, which is overwritten; a new tensor.

    d log p_k / d x_j = [j = k] - p_j and dH / d x_j = -p_j (log p_j + H), so with upstream gradients g and h:
    [j = k] g - p_j (g + h H + h log p_j).
    """
    grad_CV = log_p_CV.exp()
    if grad_entropy_C is None or entropy_C is None:
        grad_CV.mul_(-grad_log_probs_C[:, None])
    else:
        log_p_CV.clamp_min_(torch.finfo(log_p_CV.dtype).min)  # p log p is 0 for p = 0
        constant_C = -grad_log_probs_C - grad_entropy_C * entropy_C
        torch.addcmul(constant_C[:, None], log_p_CV, -grad_entropy_C[:, None], out=log_p_CV)
        grad_CV.mul_(log_p_CV)
    ours_C = (columns_C >= 0) & (columns_C < log_p_CV.shape[1])
    at_token_C = torch.where(ours_C, grad_log_probs_C, 0.0)
    return grad_CV.scatter_add_(-1, torch.where(ours_C, columns_C, 0)[:, None], at_token_C[:, None])


def upstream_gradients(
    grad_log_probs_T: torch.Tensor | None,
    grad_entropy_T: torch.Tensor | None,
    like_T: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Upstream gradients divided by the temperature, which makes the gradient of scaled logits that of the logits."""
    grad_log_probs_T = torch.zeros_like(like_T) if grad_log_probs_T is None else grad_log_probs_T / temperature
    return grad_log_probs_T, None if grad_entropy_T is None else grad_entropy_T / temperature


class _TokenLogProbs(torch.autograd.Function):
    """Chunked forward; the backward recomputes each chunk's softmax."""

    @staticmethod
    def forward(
        ctx: Any, logits_TV: torch.Tensor, tokens_T: torch.Tensor, settings: _Settings
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shard = settings.shard
        columns_T = tokens_T if shard is None else tokens_T - shard.first_token(logits_TV.shape[1])
        chunks = [
            local_stats(
                scaled(logits_CV, settings.temperature),
                columns_C,
                with_entropy=settings.with_entropy,
                with_norm=shard is not None,
                whole=shard is None,
            )
            for logits_CV, columns_C in zip(
                torch.split(logits_TV, settings.chunk_rows), torch.split(columns_T, settings.chunk_rows), strict=True
            )
        ]
        stats = concatenate(chunks)
        log_probs_T, entropy_T, log_weight_T = stats.log_probs_C, stats.entropy_C, None
        if shard is not None:
            log_probs_T, entropy_T, log_weight_T = combine_shards(stats, shard.group)
        ctx.settings = settings
        ctx.save_for_backward(logits_TV, columns_T, log_probs_T, entropy_T, log_weight_T)
        ctx.set_materialize_grads(False)
        return log_probs_T, log_probs_T.new_empty(0) if entropy_T is None else entropy_T

    @staticmethod
    def backward(
        ctx: Any, grad_log_probs_T: torch.Tensor | None, grad_entropy_T: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, None, None]:
        logits_TV, columns_T, log_probs_T, entropy_T, log_weight_T = ctx.saved_tensors
        settings: _Settings = ctx.settings
        if grad_log_probs_T is None and grad_entropy_T is None:
            return None, None, None
        grad_log_probs_T, grad_entropy_T = upstream_gradients(
            grad_log_probs_T, grad_entropy_T, log_probs_T, settings.temperature
        )
        grad_TV = logits_TV.detach() if settings.overwrite_logits else torch.empty_like(logits_TV)
        for start in range(0, len(logits_TV), settings.chunk_rows):
            rows = slice(start, start + settings.chunk_rows)
            log_p_CV = torch.log_softmax(scaled(logits_TV[rows], settings.temperature), dim=-1)
            if log_weight_T is not None:
                log_p_CV.add_(log_weight_T[rows, None])
            grad_TV[rows] = gradient_of_scores(
                log_p_CV,
                columns_T[rows],
                None if entropy_T is None else entropy_T[rows],
                grad_log_probs_T[rows],
                None if grad_entropy_T is None else grad_entropy_T[rows],
            )
        return grad_TV, None, None
