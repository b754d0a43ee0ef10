"""Softmax statistics and gradients of rows of logits, complete or this rank's columns.

Shared by the two ways to score tokens, from logits and from hidden states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.distributed as dist

from miles.algorithms.packing import as_float

_LOWEST_LOG_P = -1e4
"""Below it p is 0 in every dtype (exp(-746) is 0 in float64), so that p log p is 0 whatever log p is."""


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
    """Of the full distribution at each position; None unless requested."""


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless the temperature is positive."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; log-probs need a positive one (score greedy samples at 1.0)")


def rows_of(elements: dict[str, int], vocab: int, device: torch.device) -> int:
    """Rows that make up a chunk of the size given for this device (any other device: as for cuda)."""
    return max(1, elements.get(device.type, elements["cuda"]) // max(vocab, 1))


def chunks(rows: int, chunk_rows: int) -> Iterator[slice]:
    """Slices of at most `chunk_rows` rows that cover all rows."""
    return (slice(start, min(start + chunk_rows, rows)) for start in range(0, rows, chunk_rows))


def scaled(logits_CV: torch.Tensor, temperature: float) -> torch.Tensor:
    """Upcast a chunk, then divide; a new tensor only where one of the two changes something."""
    x_CV = as_float(logits_CV)
    return x_CV if temperature == 1 else x_CV / temperature


@dataclasses.dataclass(frozen=True)
class RowStats:
    """Statistics of each row from one rank, relative to the softmax over its own columns.

    The tensors are allocated once and filled chunk by chunk: small tensors allocated between two large temporaries
    would fragment the heap, and memory would grow with every chunk.
    """

    log_probs_T: torch.Tensor
    """At the token; -inf where the token is in another rank's columns. [T, M] where a row has several tokens."""
    entropy_T: torch.Tensor | None
    max_T: torch.Tensor | None
    log_sum_T: torch.Tensor | None
    """log sum exp(x - max), at least 0."""

    @classmethod
    def empty(cls, logits_like: torch.Tensor, tokens: torch.Size, *, with_entropy: bool, with_norm: bool) -> RowStats:
        """Allocate statistics for tokens [T] or [T, M] of T rows of logits of this dtype and device."""
        dtype = torch.float64 if logits_like.dtype == torch.float64 else torch.float32

        def allocate(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=logits_like.device)

        norms = (allocate(tokens[0]), allocate(tokens[0])) if with_norm else (None, None)
        return cls(allocate(*tokens), allocate(tokens[0]) if with_entropy else None, *norms)

    def fill(self, rows: slice, x_CV: torch.Tensor, columns_C: torch.Tensor, *, whole: bool) -> None:
        """Compute the statistics of a chunk of scaled logits.

        Args:
            rows: which rows the chunk holds.
            x_CV: float32 or float64.
            columns_C: column of each row's token, outside [0, V) where another rank has it; [C, M] for several tokens.
            whole: the columns are the full vocabulary, which contains every token.
        """
        log_softmax_CV = torch.log_softmax(x_CV, dim=-1)
        if self.max_T is not None and self.log_sum_T is not None:
            max_C, argmax_C = x_CV.max(dim=-1)
            self.max_T[rows] = max_C
            log_sum_C = -log_softmax_CV.gather(-1, argmax_C[:, None]).squeeze(-1)
            impossible_C = max_C == -torch.inf  # no token of this shard, as where a padded vocabulary's logits are -inf
            self.log_sum_T[rows] = torch.where(impossible_C, 0.0, log_sum_C)
            if not whole:
                log_softmax_CV.masked_fill_(impossible_C[:, None], -torch.inf)  # not NaN
        if whole:
            self.log_probs_T[rows] = log_softmax_CV.gather(-1, _several(columns_C)).view_as(columns_C)
        else:
            ours_C = (columns_C >= 0) & (columns_C < x_CV.shape[1])
            found_C = log_softmax_CV.gather(-1, torch.where(ours_C, columns_C, 0)[:, None]).squeeze(-1)
            self.log_probs_T[rows] = torch.where(ours_C, found_C, -torch.inf)
        if self.entropy_T is not None:
            self.entropy_T[rows] = row_entropy(log_softmax_CV)


def row_entropy(log_softmax_CV: torch.Tensor) -> torch.Tensor:
    """-sum p log p of each row, where p log p is 0 for p = 0. Overwrites its argument."""
    p_CV = log_softmax_CV.exp()
    log_softmax_CV.clamp_min_(_LOWEST_LOG_P)
    return -p_CV.mul_(log_softmax_CV).sum(dim=-1)


def combine_shards(stats: RowStats, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Return full-vocabulary log-probs and entropies, and the log weight of this rank's columns.

    With Z_r the sum of exp over rank r's columns and w_r = Z_r / sum Z, a token's log-prob is its local one plus
    log w_r, and the entropy is sum_r w_r (H_r - log w_r). A token that no rank has gets -inf.
    """
    assert stats.max_T is not None
    assert stats.log_sum_T is not None
    top_T = stats.max_T.clone()
    dist.all_reduce(top_T, op=dist.ReduceOp.MAX, group=group)
    log_mass_T = (stats.max_T - top_T) + stats.log_sum_T
    total_T = log_mass_T.exp()
    dist.all_reduce(total_T, op=dist.ReduceOp.SUM, group=group)
    log_weight_T = log_mass_T - total_T.log()
    log_probs_T = stats.log_probs_T + log_weight_T
    dist.all_reduce(log_probs_T, op=dist.ReduceOp.MAX, group=group)
    if stats.entropy_T is None:
        return log_probs_T, None, log_weight_T
    entropy_T = log_weight_T.exp() * (stats.entropy_T - log_weight_T.clamp_min(_LOWEST_LOG_P))
    dist.all_reduce(entropy_T, op=dist.ReduceOp.SUM, group=group)
    return log_probs_T, entropy_T, log_weight_T


def gradient_of_scores(
    log_p_CV: torch.Tensor,
    columns_C: torch.Tensor,
    entropy_C: torch.Tensor | None,
    grad_log_probs_C: torch.Tensor,
    grad_entropy_C: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient of scaled logits whose log-softmax is `log_p_CV`, which is overwritten; a new tensor.

    d log p_k / d x_j = [j = k] - p_j and dH / d x_j = -p_j (log p_j + H), so with upstream gradients g and h:
    [j = k] g - p_j (g + h H + h log p_j). Rows with several tokens, [C, M], add up what each of them gives.
    """
    grad_CV = log_p_CV.exp()
    columns_CM, at_token_CM = _several(columns_C), _several(grad_log_probs_C)
    total_C = at_token_CM.sum(-1)
    if grad_entropy_C is None or entropy_C is None:
        grad_CV.mul_(-total_C[:, None])
    else:
        log_p_CV.clamp_min_(_LOWEST_LOG_P)  # p log p is 0 for p = 0, times any upstream gradient
        constant_C = -total_C - grad_entropy_C * entropy_C
        torch.addcmul(constant_C[:, None], log_p_CV, -grad_entropy_C[:, None], out=log_p_CV)
        grad_CV.mul_(log_p_CV)
    ours_CM = (columns_CM >= 0) & (columns_CM < log_p_CV.shape[1])
    columns_CM, at_token_CM = torch.where(ours_CM, columns_CM, 0), torch.where(ours_CM, at_token_CM, 0.0)
    for m in range(columns_CM.shape[1]):  # one by one: a row's tokens may be equal, and sums are in a fixed order
        grad_CV.scatter_add_(-1, columns_CM[:, m, None], at_token_CM[:, m, None])
    return grad_CV


def _several(tokens_C: torch.Tensor) -> torch.Tensor:
    """[C, M] from values of one token a row, [C], or of M."""
    return tokens_C[:, None] if tokens_C.dim() == 1 else tokens_C


def upstream_gradients(
    grad_log_probs_T: torch.Tensor | None,
    grad_entropy_T: torch.Tensor | None,
    like_T: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Upstream gradients divided by the temperature, which makes the gradient of scaled logits that of the logits."""
    grad_log_probs_T = torch.zeros_like(like_T) if grad_log_probs_T is None else grad_log_probs_T / temperature
    return grad_log_probs_T, None if grad_entropy_T is None else grad_entropy_T / temperature
