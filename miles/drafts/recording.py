"""What a draft model learns from: samples, the policy's hidden states over them, and what it would have said.

Dims: T tokens of a sample, R of them its response, L recorded layers, D hidden size, K likeliest tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True, slots=True)
class RecordedSample:
    """One sample of a training step, as the policy's forward pass saw it."""

    tokens_T: torch.Tensor
    """Prompt and response, int64 [T]."""
    prompt_length: int
    """T - R."""
    hidden_TD: Mapping[int, torch.Tensor]
    """By layer number i, from 0: the residual stream behind decoder layer i, in the policy's type [T - 1, D], which is
    also what layer i + 1 reads; by `EMBEDDING` (-1) the tokens' rows of the policy's embedding table. There is no row
    of the last token, which the trainer does not compute: it predicts nothing. Row `prompt_length` - 1 + r predicts
    response token r. Empty for drafts that read tokens alone."""
    top_tokens_RK: torch.Tensor
    """The policy's likeliest tokens for each response token, from the likeliest on, int64 [R, K]; -1 where the
    vocabulary has fewer, with log-probability -inf."""
    top_log_probs_RK: torch.Tensor
    """Their log-probabilities at the sampling temperature, in nats, float32 [R, K]."""
    loss_mask_R: torch.Tensor
    """Response tokens that the policy has sampled and trains on, bool [R]: others, of tools, teach a draft nothing."""
