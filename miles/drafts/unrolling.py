"""A pass of an EAGLE-3 head over a batch as it will draft: training-time test (arXiv 2503.01840, section 3.2)."""

from __future__ import annotations

import torch

from miles.drafts.eagle3 import Eagle3Head
from miles.drafts.head_pass import head_pass
from miles.drafts.losses import Loss, chain_length
from miles.drafts.packed_batch import PackedBatch
from miles.drafts.trainable import PassResult
from miles.drafts.unrolled_attention import UnrolledAttention
from miles.drafts.vocabulary import DraftVocabulary

DECAY = 0.8
"""Weight of an unrolled step's loss over that of the step before, as in the authors' code."""


def learn_from(head: Eagle3Head, batch: PackedBatch, vocabulary: DraftVocabulary, loss: Loss, steps: int) -> PassResult:
    """Add the gradients of the mean loss over `steps` unrolled steps to the head's.

    The logits of a step are computed and forgotten chunk by chunk: their gradient with respect to what the head
    returned is kept, and goes through the head once.
    """
    attention = UnrolledAttention(batch.rectangles)
    hidden_ND = head.fc(batch.hidden_NF).float()
    streams: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    hits_SN = torch.zeros(steps, len(batch.positions_N), dtype=torch.bool, device=hidden_ND.device)
    total = torch.zeros((), device=hidden_ND.device)
    agreed = torch.zeros((), device=hidden_ND.device)
    weights = [DECAY**step for step in range(steps)]
    for step, rows in enumerate(batch.learnt_rows):
        if not len(rows):
            break
        hidden_ND = head(hidden_ND, batch.embeds_ND(step), batch.positions_N + step, attention)
        targets, weight = batch.targets(step), weights[step] / sum(weights) / len(rows)
        found = head_pass(head.logits, hidden_ND.detach().index_select(0, rows), targets, loss, vocabulary, weight)
        total += found.loss
        hits_SN[step, rows] = found.drafts_N == targets.sampled_N
        if step == 0:
            agreed += (found.drafts_N == targets.top_tokens_NK[:, 0]).sum()
        streams.append(hidden_ND)
        gradients.append(torch.zeros_like(hidden_ND).index_copy_(0, rows, found.gradient_ND))
    if streams:
        torch.autograd.backward(streams, gradients)
    chains = chain_length(hits_SN.index_select(1, batch.roots)).sum()
    return PassResult(total, len(batch.learnt_rows[0]), agreed, chains, len(batch.roots))
