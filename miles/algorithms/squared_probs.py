"""The sum of squared probabilities of each row, from logits or from hidden states; without gradient.

Dims: T rows, V vocabulary (this rank's columns of it with a shard), D hidden size.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from miles.algorithms.log_probs import CHUNK_ELEMENTS
from miles.algorithms.vocab_rows import VocabShard, check_temperature, chunks, rows_of, scaled


@torch.no_grad()
def sum_squared_probs(
    logits_TV: torch.Tensor,
    *,
    temperature: float = 1.0,
    shard: VocabShard | None = None,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """sum p^2 with p = softmax(logits / temperature), one chunk of rows at a time; float32 [T] (float64 stays).

    Args:
        logits_TV: of any float dtype.
        temperature: divides the logits, after the upcast to float32.
        shard: how the vocabulary is split; None: it is not.
        chunk_rows: rows upcast at a time; None: as many as make up `CHUNK_ELEMENTS`.
    """
    check_temperature(temperature)
    rows = rows_of(CHUNK_ELEMENTS, logits_TV.shape[1], logits_TV.device) if chunk_rows is None else chunk_rows
    parts = [_of_rows(scaled(logits_TV[part], temperature), shard) for part in chunks(len(logits_TV), rows)]
    return torch.cat(parts) if parts else logits_TV.new_zeros(0, dtype=torch.float32)


@torch.no_grad()
def linear_sum_squared_probs(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, *, temperature: float = 1.0, chunk_rows: int | None = None
) -> torch.Tensor:
    """The same from hidden states and the head's weight, whose logits never exist in full."""
    rows = rows_of(CHUNK_ELEMENTS, weight_VD.shape[0], weight_VD.device) if chunk_rows is None else chunk_rows
    parts = [
        sum_squared_probs(F.linear(hidden_TD[part], weight_VD), temperature=temperature, chunk_rows=rows)
        for part in chunks(len(hidden_TD), rows)
    ]
    return torch.cat(parts) if parts else hidden_TD.new_zeros(0, dtype=torch.float32)


def _of_rows(x_CV: torch.Tensor, shard: VocabShard | None) -> torch.Tensor:
    """sum e^(2x) / (sum e^x)^2 relative to each row's largest x."""
    top_C = x_CV.max(dim=-1).values
    if shard is not None:
        dist.all_reduce(top_C, op=dist.ReduceOp.MAX, group=shard.group)
    masses_CV = (x_CV - torch.where(top_C.isfinite(), top_C, 0.0)[:, None]).exp()
    sums_2C = torch.stack([masses_CV.sum(dim=-1), masses_CV.square().sum(dim=-1)])
    if shard is not None:
        dist.all_reduce(sums_2C, op=dist.ReduceOp.SUM, group=shard.group)
    return sums_2C[1] / sums_2C[0].square()
