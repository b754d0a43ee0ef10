"""Aggregation of per-token losses, so that micro-batches and ranks add up to the mean of one process.

The loss of a micro-batch is a sum divided by a denominator of the whole optimizer step. Adding the losses (and so the
gradients) of all micro-batches of all data-parallel ranks gives what one process would compute over all samples.
"""

from __future__ import annotations

import torch

from miles.algorithms.packing import Packing, as_float, keep_where


def token_weights(
    mask_T: torch.Tensor,
    packing: Packing,
    *,
    per_token: bool = False,
    constant_length: float | None = None,
    mask_sums_B: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the weight of each token in the numerator of the loss, [T]; 0 where masked.

    Args:
        mask_T: tokens that count.
        packing: of the tokens.
        per_token: every token weighs 1 (calculate_per_token_loss). False: a token weighs 1 / its sample's mask sum.
        constant_length: a token weighs 1 / this instead (Dr. GRPO).
        mask_sums_B: denominators in place of the samples' own mask sums, for rollouts that became several samples: the
            mask sum of the whole rollout.
        dtype: of the result.
    """
    weights_T = mask_T.bool().to(dtype)
    if per_token:
        return weights_T
    if constant_length is not None:
        return weights_T / constant_length
    sums_B = packing.sum(weights_T) if mask_sums_B is None else mask_sums_B.to(weights_T)
    return weights_T / packing.expand(sums_B.clamp_min(1))


def aggregate(
    values_T: torch.Tensor,
    mask_T: torch.Tensor,
    packing: Packing,
    *,
    denominator: float | None = None,
    per_token: bool = False,
    constant_length: float | None = None,
    mask_sums_B: torch.Tensor | None = None,
    keep_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the sum of weighted token values over `denominator`, 0-d; see `token_weights`.

    Args:
        values_T: per token; values at masked tokens are ignored.
        mask_T: tokens that count.
        packing: of the tokens.
        denominator: rollouts of the whole optimizer step over all ranks; with `per_token` its unmasked tokens. None:
            those of this call. A step without unmasked tokens gives 0.
        per_token: see `token_weights`.
        constant_length: see `token_weights`.
        mask_sums_B: see `token_weights`.
        keep_T: False for rejected tokens: their values count as 0, weights and denominators stay.
    """
    weights_T = token_weights(
        mask_T,
        packing,
        per_token=per_token,
        constant_length=constant_length,
        mask_sums_B=mask_sums_B,
        dtype=as_float(values_T).dtype,
    )
    if denominator is None:
        denominator = float(mask_T.bool().sum()) if per_token else packing.num_samples
    return weighted_sum(values_T, weights_T, mask_T, keep_T) / max(denominator, 1)


def weighted_sum(
    values_T: torch.Tensor, weights_T: torch.Tensor, mask_T: torch.Tensor, keep_T: torch.Tensor | None = None
) -> torch.Tensor:
    """The numerator of `aggregate`, 0-d: the sum of what is neither masked nor rejected, by the weights of `mask_T`."""
    kept_T = keep_where(mask_T if keep_T is None else mask_T.bool() & keep_T.bool(), values_T)
    return (kept_T * weights_T).sum()
