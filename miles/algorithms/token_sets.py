"""Log-probs at several tokens of each row, and the likeliest tokens, without gradient; also vocabulary-parallel.

One chunk of rows is worked on at a time and a few columns are kept of each, so that no second tensor of the logits'
size exists. Dims: T rows, V columns of the vocabulary (this rank's), C rows of a chunk, M given tokens, K likeliest.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

from miles.algorithms.log_probs import CHUNK_ELEMENTS
from miles.algorithms.vocab_rows import VocabShard, check_temperature, chunks, rows_of, scaled

MAX_TOKEN_ID = 1 << 24
"""Token ids up to here are exact in float32, in which they travel with log-probs."""


@dataclasses.dataclass(frozen=True, slots=True)
class TokenSetScores:
    """What is known of each row."""

    log_probs_TM: torch.Tensor
    """Of the given tokens; −inf for ids outside the vocabulary. float32 (float64 for float64 logits)."""
    top_ids_TK: torch.Tensor
    """The likeliest tokens, from the likeliest on; int64. −1 where the vocabulary has fewer."""
    top_log_probs_TK: torch.Tensor
    """Theirs; −inf where there is none."""

    def joined(self) -> torch.Tensor:
        """All as one tensor [T, M + 2 K] of the log-probs' type."""
        return torch.cat([self.log_probs_TM, self.top_ids_TK.to(self.log_probs_TM.dtype), self.top_log_probs_TK], dim=1)

    @classmethod
    def from_joined(cls, joined_TX: torch.Tensor, top_k: int) -> TokenSetScores:
        """Read what `joined` gave."""
        given = joined_TX.shape[1] - 2 * top_k
        ids_TK = joined_TX[:, given : given + top_k].long()
        return cls(joined_TX[:, :given], ids_TK, joined_TX[:, given + top_k :])


@torch.no_grad()
def score_token_sets(
    logits_TV: torch.Tensor,
    tokens_TM: torch.Tensor | None,
    top_k: int,
    *,
    temperature: float = 1.0,
    shard: VocabShard | None = None,
    chunk_rows: int | None = None,
) -> TokenSetScores:
    """Score log softmax(logits / temperature) at the given tokens, and at the `top_k` likeliest.

    Args:
        logits_TV: [T, V], or [T, V / ranks] with `shard`; any float type.
        tokens_TM: token ids [T, M]; None for none.
        top_k: K; 0 for none.
        temperature: divides the logits, after the upcast.
        shard: how the vocabulary is split; every rank calls, with the same rows and tokens, and gets the same.
        chunk_rows: rows upcast at a time; None: as many as make up `CHUNK_ELEMENTS`.

    Raises:
        ValueError: a shape does not fit, or the temperature is not positive.
    """
    if tokens_TM is None:
        tokens_TM = torch.zeros(len(logits_TV), 0, dtype=torch.int64, device=logits_TV.device)
    if logits_TV.dim() != 2 or tokens_TM.dim() != 2 or len(tokens_TM) != len(logits_TV):
        shapes = f"{tuple(logits_TV.shape)} and {tuple(tokens_TM.shape)}"
        raise ValueError(f"need logits [T, V] and tokens [T, M], got {shapes}")
    check_temperature(temperature)
    rows = rows_of(CHUNK_ELEMENTS, logits_TV.shape[1], logits_TV.device) if chunk_rows is None else chunk_rows
    columns_TM = tokens_TM.long() - (0 if shard is None else shard.first_token(logits_TV.shape[1]))
    parts = [
        _score_chunk(scaled(logits_TV[where], temperature), columns_TM[where], top_k, shard)
        for where in chunks(len(logits_TV), rows)
    ]
    if not parts:
        nothing = scaled(logits_TV[:, :0], temperature)
        return TokenSetScores(
            nothing.new_zeros(0, tokens_TM.shape[1]),
            nothing.new_zeros(0, top_k, dtype=torch.int64),
            nothing.new_zeros(0, top_k),
        )
    return TokenSetScores(
        torch.cat([part.log_probs_TM for part in parts]),
        torch.cat([part.top_ids_TK for part in parts]),
        torch.cat([part.top_log_probs_TK for part in parts]),
    )


def _score_chunk(x_CV: torch.Tensor, columns_CM: torch.Tensor, top_k: int, shard: VocabShard | None) -> TokenSetScores:
    x_CV = x_CV - _log_normalizer(x_CV, shard)[:, None] if shard is not None else torch.log_softmax(x_CV, dim=-1)
    ours_CM = (columns_CM >= 0) & (columns_CM < x_CV.shape[1])
    found_CM = x_CV.gather(-1, torch.where(ours_CM, columns_CM, 0))
    log_probs_CM = torch.where(ours_CM, found_CM, -torch.inf)
    count = min(top_k, x_CV.shape[1])
    top_CK, ids_CK = x_CV.topk(count, dim=-1)
    if shard is not None:
        ids_CK = ids_CK + shard.first_token(x_CV.shape[1])
    top_CK = torch.nn.functional.pad(top_CK, (0, top_k - count), value=-torch.inf)
    ids_CK = torch.nn.functional.pad(ids_CK, (0, top_k - count), value=-1)
    if shard is not None:
        if log_probs_CM.numel():
            dist.all_reduce(log_probs_CM, op=dist.ReduceOp.MAX, group=shard.group)
        if top_k:
            top_CK, ids_CK = _top_of_all(top_CK, ids_CK, shard.group)
    return TokenSetScores(log_probs_CM, ids_CK, top_CK)


def _log_normalizer(x_CV: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """log Σ exp over the whole vocabulary; [C]."""
    top_C = x_CV.max(dim=-1).values
    dist.all_reduce(top_C, op=dist.ReduceOp.MAX, group=shard.group)
    total_C = (x_CV - top_C[:, None]).exp().sum(dim=-1)
    dist.all_reduce(total_C, op=dist.ReduceOp.SUM, group=shard.group)
    return top_C + total_C.log()


def _top_of_all(
    top_CK: torch.Tensor, ids_CK: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest of every rank's likeliest, the same on all."""
    count = dist.get_world_size(group)
    tops, ids = ([torch.empty_like(each) for _ in range(count)] for each in (top_CK, ids_CK))
    dist.all_gather(tops, top_CK.contiguous(), group=group)
    dist.all_gather(ids, ids_CK.contiguous(), group=group)
    values_CK, places_CK = torch.cat(tops, dim=1).topk(top_CK.shape[1], dim=-1)
    return values_CK, torch.cat(ids, dim=1).gather(1, places_CK)
