"""The vocabulary head of a draft over rows that predict tokens: loss, gradients, and what the draft would say.

Dims: N rows, C of them at a time, D hidden size, V tokens of the draft's vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from miles.algorithms.vocab_rows import chunks, rows_of
from miles.drafts.losses import Loss
from miles.drafts.packed_batch import Targets
from miles.drafts.vocabulary import DraftVocabulary

CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}
"""Logits that are in memory at a time, by device: on a GPU 256 MiB in 16 bits, and at most twice 512 MiB in float32.
Each chunk adds to the gradient of the whole head, so that small ones would be slow."""


@dataclasses.dataclass(frozen=True, slots=True)
class HeadPass:
    """What a pass over rows found."""

    loss: torch.Tensor
    """Weighted sum over the rows, 0-d float32."""
    gradient_ND: torch.Tensor
    """Of that sum, with respect to the rows."""
    drafts_N: torch.Tensor
    """The draft's likeliest tokens, as the policy numbers them, int64."""


def head_pass(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    hidden_ND: torch.Tensor,
    targets: Targets,
    loss: Loss,
    vocabulary: DraftVocabulary,
    weight: float,
) -> HeadPass:
    """Compute logits chunk by chunk and forget them; the gradients of the head's parameters are added to theirs."""
    total = torch.zeros((), device=hidden_ND.device)
    gradient_ND = torch.empty_like(hidden_ND)
    drafts = []
    for rows in chunks(len(hidden_ND), rows_of(CHUNK_ELEMENTS, len(vocabulary.ids_V), hidden_ND.device)):
        leaf_CD = hidden_ND[rows].detach().requires_grad_()
        logits_CV = logits_of(leaf_CD)
        part = loss(logits_CV, targets[rows], vocabulary).sum() * weight
        part.backward()  # type: ignore[no-untyped-call]
        assert leaf_CD.grad is not None
        gradient_ND[rows] = leaf_CD.grad
        total += part.detach()
        drafts.append(vocabulary.policy_ids(logits_CV.detach().argmax(-1)))
    return HeadPass(total, gradient_ND, torch.cat(drafts))
