"""What a draft learns to say, and how often the policy would have accepted it.

Dims: N predicted tokens, V tokens of the draft's vocabulary, K likeliest tokens of the policy's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from miles.drafts.packed_batch import Targets
from miles.drafts.vocabulary import DraftVocabulary

Loss = Callable[[torch.Tensor, Targets, DraftVocabulary], torch.Tensor]
"""Of rows' logits, float32 [N]."""

_SMALLEST = 1e-6
"""Probability that the draft gives all other tokens at least, in nats' range of float32."""


def cross_entropy(logits_NV: torch.Tensor, targets: Targets, vocabulary: DraftVocabulary) -> torch.Tensor:
    """Cross-entropy with the tokens that were sampled, in nats, float32 [N]; 0 for those that the draft has not."""
    sampled_N = vocabulary.draft_ids(targets.sampled_N)
    losses_N = -log_probs_at(logits_NV, sampled_N.clamp(min=0)[:, None])[:, 0]
    return torch.where(sampled_N >= 0, losses_N, 0.0)


def top_k_divergence(logits_NV: torch.Tensor, targets: Targets, vocabulary: DraftVocabulary) -> torch.Tensor:
    """KL divergence from the policy's distribution to the draft's, in nats, float32 [N].

    All tokens but the policy's K likeliest count as one: the divergence of the coarser distributions, which is at most
    that of the full ones (the data-processing inequality) and 0 where those are equal. Renormalising the K instead
    would teach the draft to give nothing to the others. Of a draft that has not all tokens, the policy's distribution
    over those that it has is the target, and where the likeliest is not among them there is none (0), as in EAGLE-3's
    own training.
    """
    ids_NK = vocabulary.draft_ids(targets.top_tokens_NK)
    has_NK = ids_NK >= 0
    policy_NK = targets.top_log_probs_NK.float().exp()
    held_N = 1 - torch.where(has_NK, 0.0, policy_NK).sum(-1)
    policy_NK = torch.where(has_NK, policy_NK, 0.0) / held_N.clamp(min=_SMALLEST)[:, None]
    others_N = (1 - policy_NK.sum(-1)).clamp(min=0)
    draft_NK = log_probs_at(logits_NV, ids_NK.clamp(min=0))
    draft_others_N = (1 - torch.where(has_NK, draft_NK.exp(), 0.0).sum(-1)).clamp(min=_SMALLEST)
    known = torch.xlogy(policy_NK, policy_NK) - policy_NK * torch.where(has_NK, draft_NK, 0.0)
    losses_N = known.sum(-1) + torch.xlogy(others_N, others_N) - others_N * draft_others_N.log()
    return torch.where(has_NK[:, 0], losses_N, 0.0)


_LOSSES: dict[str, Loss] = {"kl": top_k_divergence, "ce": cross_entropy}


def loss_at(name: str, temperature: float) -> Loss:
    """The loss that `draft_loss` names, of a draft whose logits are divided by the sampling temperature.

    So are the policy's, and those of a draft that an engine samples from: one that is the policy has nothing to learn.
    """
    loss = _LOSSES[name]
    if temperature == 1:
        return loss

    def divided(logits_NV: torch.Tensor, targets: Targets, vocabulary: DraftVocabulary) -> torch.Tensor:
        return loss(logits_NV / temperature, targets, vocabulary)

    return divided


def log_probs_at(logits_NV: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of K tokens of each row, in nats, float32 [N, K]. Its backward pass works once.

    One float32 tensor of the logits' size is kept, in which the backward pass leaves their gradient; autograd's own has
    three, each written and read in full.
    """
    found_NK: torch.Tensor = _LogProbsAt.apply(logits_NV, ids_NK)  # type: ignore[no-untyped-call]
    return found_NK


class _LogProbsAt(torch.autograd.Function):
    """d log p_k / d x_j = [j = k] - p_j, summed over k."""

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
        log_probs_NV = logits_NV.log_softmax(-1, dtype=torch.float32)
        ctx.save_for_backward(log_probs_NV, ids_NK)
        ctx.dtype = logits_NV.dtype
        return log_probs_NV.gather(-1, ids_NK)

    @staticmethod
    def backward(ctx: Any, grad_NK: torch.Tensor) -> tuple[torch.Tensor, None]:
        log_probs_NV, ids_NK = ctx.saved_tensors
        grad_NV = log_probs_NV.exp_().mul_(-grad_NK.sum(-1, keepdim=True))
        return grad_NV.scatter_add_(-1, ids_NK, grad_NK).to(ctx.dtype), None


def chain_length(hits_SN: torch.Tensor) -> torch.Tensor:
    """Tokens of a verification with a chain of S drafts, the policy's own included, float32 [N].

    `hits_SN`: whether the draft at each step, on the true tokens before it, was the token that was sampled. Drafts are
    accepted up to the first that is not.
    """
    return 1 + hits_SN.float().cumprod(0).sum(0)
