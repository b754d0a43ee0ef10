"""Policy losses that give all tokens of a sequence one ratio, beside gspo.

The value on each token is that of its sequence, as in gspo, so that a mean over a sample's tokens is the sequence's.
"""

from __future__ import annotations

import dataclasses

import torch

from miles.algorithms.packing import as_float, keep_where
from miles.algorithms.policy_losses import (
    PolicyInputs,
    PolicyLossConfig,
    PolicyTerms,
    bounded_exp,
    gspo,
    register_policy_loss,
)


@register_policy_loss("gmpo", trust_region=True)
def gmpo(config: PolicyLossConfig, inputs: PolicyInputs) -> PolicyTerms:
    """-s A with the geometric mean s of a sequence's clipped ratios (GMPO, 2507.20673).

    Each token's log ratio is clipped before the mean, at `eps_clip_high` above where its advantage is positive and at
    -`eps_clip` below elsewhere. The bounds are those of the log ratio: the paper's (e^-0.4, e^0.4) is 0.4.
    """
    log_ratio_T = inputs.log_probs_T - inputs.old_log_probs_T
    low, high = config.eps_clip, config.eps_clip if config.eps_clip_high is None else config.eps_clip_high
    kept_T = torch.where(inputs.advantages_T > 0, log_ratio_T.clamp(max=high), log_ratio_T.clamp(min=-low))
    mean_B = inputs.packing.mean(kept_T, inputs.mask_T)
    sequence_T = keep_where(inputs.mask_T, inputs.packing.expand(mean_B))
    clipped_T = as_float((kept_T.detach() != log_ratio_T.detach()) & (inputs.advantages_T != 0))
    return PolicyTerms(-bounded_exp(sequence_T) * inputs.advantages_T, clipped_T, sequence_T)


@register_policy_loss("luspo", trust_region=True)
def luspo(config: PolicyLossConfig, inputs: PolicyInputs) -> PolicyTerms:
    """gspo's loss of each sequence times the number of its trained tokens (LUSPO, 2602.05261).

    A mean over a sample's tokens divides by that number, which makes long sequences' tokens count less.
    """
    terms = gspo(config, inputs)
    lengths_B = inputs.packing.sum(inputs.mask_T.to(terms.loss_T.dtype))
    return dataclasses.replace(terms, loss_T=terms.loss_T * inputs.packing.expand(lengths_B))
