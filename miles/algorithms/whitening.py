"""Masked whitening with statistics of the whole data-parallel group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from miles.algorithms.collectives import all_reduce_sum
from miles.algorithms.packing import as_float, keep_where

if TYPE_CHECKING:
    import torch.distributed as dist

EPSILON = 1e-8


def masked_whiten(values_T: torch.Tensor, mask_T: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """(x - mean) * rsqrt(var + 1e-8), mean and variance over the unmasked tokens of all ranks of `group`.

    The variance has Bessel's correction where there are two tokens or more. Statistics are taken in float64 in two
    passes, so that they do not depend on how tokens are spread over ranks. The map is applied to masked tokens too.
    Every rank of the group must call, with any shape (its own tokens, possibly none).

    Returns:
        float32 (float64 stays), the shape of `values_T`; zeros where no rank has an unmasked token.
    """
    values_T = as_float(values_T)
    kept_T = keep_where(mask_T, values_T).double()
    mask_T = mask_T.bool().double()
    total, count = all_reduce_sum(torch.stack([kept_T.sum(), mask_T.sum()]), group)
    if count == 0:
        return torch.zeros_like(values_T)
    mean = total / count
    squares = all_reduce_sum(((kept_T - mean).square() * mask_T).sum(), group)
    variance = squares / (count - 1).clamp_min(1)
    whitened_T: torch.Tensor = (values_T.double() - mean) * torch.rsqrt(variance + EPSILON)
    return whitened_T.to(values_T.dtype)
