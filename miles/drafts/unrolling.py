"""A pass of an EAGLE-3 head over a batch as it will draft: training-time test (arXiv 2503.01840, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from miles.drafts.eagle3 import Eagle3Head
from miles.drafts.losses import chain_length
from miles.drafts.packed_batch import PackedBatch, Targets
from miles.drafts.trainable import PassResult
from miles.drafts.unrolled_attention import PackedRows, UnrolledAttention
from miles.drafts.vocabulary import DraftVocabulary

Loss = Callable[[torch.Tensor, Targets, DraftVocabulary], torch.Tensor]

DECAY = 0.8
"""Weight of an unrolled step's loss over that of the step before, as in the authors' code."""
CHUNK = 2048
"""Rows whose logits are in memory at a time."""


def learn_from(head: Eagle3Head, batch: PackedBatch, vocabulary: DraftVocabulary, loss: Loss, steps: int) -> PassResult:
    """Add the gradients of the mean loss over `steps` unrolled steps to the head's.

    The logits of a step are computed and forgotten chunk by chunk: their gradient with respect to what the head
    returned is kept, and goes through the head once.
    """
    attention = UnrolledAttention(PackedRows(batch.lengths, batch.positions_N.device))
    hidden_ND = head.fc(batch.hidden_NF).float()
    streams: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    hits_SN = torch.zeros(steps, len(batch.positions_N), dtype=torch.bool, device=hidden_ND.device)
    learnt_SN = torch.zeros_like(hits_SN)
    total = torch.zeros((), device=hidden_ND.device)
    agreed = torch.zeros((), device=hidden_ND.device)
    weights = [DECAY**step for step in range(steps)]
    for step in range(steps):
        rows = batch.learnt_rows(step)
        if not len(rows):
            break
        hidden_ND = head(hidden_ND, batch.embeds_ND(step), batch.positions_N + step, attention)
        leaf_ND = hidden_ND.detach().requires_grad_()
        for part in torch.split(rows, CHUNK):
            targets = batch.targets(step, part)
            logits_NV = head.logits(leaf_ND[part])
            mean = loss(logits_NV, targets, vocabulary).sum() * (weights[step] / sum(weights) / len(rows))
            mean.backward()  # type: ignore[no-untyped-call]
            total += mean.detach()
            drafts_N = vocabulary.policy_ids(logits_NV.detach().argmax(-1))
            hits_SN[step, part] = drafts_N == targets.sampled_N
            if step == 0:
                agreed += (drafts_N == targets.top_tokens_NK[:, 0]).sum()
        learnt_SN[step, rows] = True
        streams.append(hidden_ND)
        assert leaf_ND.grad is not None
        gradients.append(leaf_ND.grad)
    if streams:
        torch.autograd.backward(streams, gradients)
    roots_N = learnt_SN.all(0)
    chains = chain_length(hits_SN[:, roots_N]).sum()
    return PassResult(float(total), int(learnt_SN[0].sum()), int(agreed), float(chains), int(roots_N.sum()))
